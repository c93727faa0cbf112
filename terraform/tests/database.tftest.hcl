mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "it_outlives_a_machine_a_zone_and_an_erroneous_destroy" {
  command = apply

  assert {
    condition     = aws_db_instance.gateway.engine == "postgres" && aws_db_instance.gateway.engine_version == "16" && aws_db_instance.gateway.auto_minor_version_upgrade
    error_message = "it is PostgreSQL 16, and the newest of it"
  }

  assert {
    condition     = aws_db_instance.gateway.multi_az
    error_message = "a standby is in another zone"
  }

  assert {
    condition     = aws_db_instance.gateway.backup_retention_period == 14 && !aws_db_instance.gateway.delete_automated_backups && aws_db_instance.gateway.copy_tags_to_snapshot
    error_message = "every second of fourteen days can be gone back to, also when it is deleted"
  }

  assert {
    condition     = aws_db_instance.gateway.deletion_protection && !aws_db_instance.gateway.skip_final_snapshot && aws_db_instance.gateway.final_snapshot_identifier != null
    error_message = "it is protected from deletion, and leaves a snapshot"
  }

  assert {
    condition     = aws_db_instance.gateway.storage_type == "gp3" && aws_db_instance.gateway.allocated_storage == 50 && aws_db_instance.gateway.max_allocated_storage == 500
    error_message = "its storage grows by itself"
  }
}

run "it_is_encrypted_private_and_asks_for_tls" {
  command = plan

  assert {
    condition     = aws_db_instance.gateway.storage_encrypted
    error_message = "it is encrypted on disk"
  }

  assert {
    condition     = !aws_db_instance.gateway.publicly_accessible && aws_db_instance.gateway.vpc_security_group_ids == toset([aws_security_group.database.id])
    error_message = "only its security group lets anybody in"
  }

  assert {
    condition     = aws_db_instance.gateway.db_subnet_group_name == aws_db_subnet_group.gateway.name && aws_db_subnet_group.gateway.subnet_ids == toset([for subnet in aws_subnet.private : subnet.id])
    error_message = "it is in the private subnets"
  }

  assert {
    condition     = aws_db_instance.gateway.parameter_group_name == aws_db_parameter_group.gateway.name
    error_message = "it has parameters of its own"
  }

  assert {
    condition     = { for parameter in aws_db_parameter_group.gateway.parameter : parameter.name => parameter.value }["rds.force_ssl"] == "1"
    error_message = "it refuses who speaks no TLS"
  }

  assert {
    condition     = { for parameter in aws_db_parameter_group.gateway.parameter : parameter.name => parameter.value }["idle_in_transaction_session_timeout"] == "10000"
    error_message = "a transaction that was left open ends after ten seconds"
  }

  assert {
    condition     = !contains([for parameter in aws_db_parameter_group.gateway.parameter : parameter.name], "statement_timeout")
    error_message = "a migration may take longer than a query"
  }

  assert {
    condition     = aws_db_instance.gateway.password == null && aws_db_instance.gateway.password_wo == null && !coalesce(aws_db_instance.gateway.manage_master_user_password, false)
    error_message = "no state has its password, and nobody changes it behind the tasks"
  }
}

run "it_says_how_it_is" {
  command = plan

  assert {
    condition     = aws_db_instance.gateway.performance_insights_enabled && aws_db_instance.gateway.monitoring_interval == 60 && aws_db_instance.gateway.monitoring_role_arn == aws_iam_role.database_monitoring.arn
    error_message = "what it does, and its machine, is measured"
  }

  assert {
    condition     = aws_db_instance.gateway.enabled_cloudwatch_logs_exports == toset(keys(aws_cloudwatch_log_group.database)) && alltrue([for group in aws_cloudwatch_log_group.database : group.retention_in_days == 365])
    error_message = "its logs are kept for a time"
  }

  assert {
    condition     = { for parameter in aws_db_parameter_group.gateway.parameter : parameter.name => parameter.value }["log_parameter_max_length"] == "0"
    error_message = "what people wrote is not in them"
  }
}

run "it_costs_less_where_it_may_be_lost" {
  command = plan

  variables {
    deletion_protection  = false
    database_multi_az    = false
    database_backup_days = 1
    database_storage_gb  = 20
    database_class       = "db.t4g.micro"
    max_tasks            = 3
  }

  assert {
    condition     = !aws_db_instance.gateway.deletion_protection && aws_db_instance.gateway.skip_final_snapshot && aws_db_instance.gateway.delete_automated_backups
    error_message = "destroy destroys it"
  }

  assert {
    condition     = !aws_db_instance.gateway.multi_az && aws_db_instance.gateway.backup_retention_period == 1 && aws_db_instance.gateway.allocated_storage == 20
    error_message = "and nothing is double"
  }
}

run "connections_of_all_tasks_are_there_for_a_deployment" {
  command = plan

  variables {
    database_class = "db.t4g.micro"
    max_tasks      = 4
  }

  expect_failures = [aws_db_instance.gateway]
}
