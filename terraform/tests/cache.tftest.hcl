mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "it_fails_over_and_forgets_no_limit" {
  command = apply

  assert {
    condition     = aws_elasticache_replication_group.gateway.engine == "valkey" && startswith(aws_elasticache_replication_group.gateway.engine_version, "8")
    error_message = "it is Valkey 8"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.num_cache_clusters == 2 && aws_elasticache_replication_group.gateway.automatic_failover_enabled && aws_elasticache_replication_group.gateway.multi_az_enabled
    error_message = "a copy in another zone takes over"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.parameter_group_name == aws_elasticache_parameter_group.gateway.name && one(aws_elasticache_parameter_group.gateway.parameter).name == "maxmemory-policy" && one(aws_elasticache_parameter_group.gateway.parameter).value == "noeviction"
    error_message = "it evicts nothing"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.snapshot_retention_limit >= 1
    error_message = "there is a snapshot of it"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.maintenance_window != null && !coalesce(aws_elasticache_replication_group.gateway.apply_immediately, false)
    error_message = "changes wait for their window"
  }
}

run "it_is_encrypted_private_and_asks_for_a_token" {
  command = plan

  assert {
    condition     = aws_elasticache_replication_group.gateway.at_rest_encryption_enabled
    error_message = "it is encrypted on disk"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.transit_encryption_enabled && aws_elasticache_replication_group.gateway.transit_encryption_mode == "required"
    error_message = "it speaks TLS only"
  }

  assert {
    condition     = can(regex("^[0-9a-f]{64}$", aws_elasticache_replication_group.gateway.auth_token))
    error_message = "its token is 64 digits that need no escape in an address"
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.security_group_ids == toset([aws_security_group.cache.id]) && aws_elasticache_replication_group.gateway.subnet_group_name == aws_elasticache_subnet_group.gateway.name
    error_message = "only its security group lets anybody in"
  }

  assert {
    condition     = aws_elasticache_subnet_group.gateway.subnet_ids == toset([for subnet in aws_subnet.private : subnet.id])
    error_message = "it is in the private subnets"
  }

  assert {
    condition     = can(regex("^rediss://:[0-9a-f]{64}@cache\\.example\\.com:6379/0$", nonsensitive(aws_secretsmanager_secret_version.redis_url.secret_string)))
    error_message = "the cache is spoken to by TLS, with its token"
  }
}

run "one_machine_has_nobody_to_fail_over_to" {
  command = plan

  variables {
    cache_replicas = 0
  }

  assert {
    condition     = aws_elasticache_replication_group.gateway.num_cache_clusters == 1 && !aws_elasticache_replication_group.gateway.automatic_failover_enabled && !aws_elasticache_replication_group.gateway.multi_az_enabled
    error_message = "AWS takes neither without a copy"
  }
}
