locals {
  # A process of the gateway takes up to ten connections, and a deployment doubles the tasks.
  database_connections = 2 * 10 * local.workers * var.max_tasks

  # What a database grants by default is LEAST({DBInstanceClassMemory/9531392}, 5000)
  # (https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/CHAP_Limits.html#RDS_Limits.MaxConnections): 112 for each GiB,
  # of which RDS takes a part for itself. 75 are there with certainty, Postgres's own three and an operator's included.
  database_memory          = lookup({ micro = 1, small = 2, medium = 4, large = 8 }, split(".", var.database_class)[2], 16) # GiB
  database_max_connections = 75 * local.database_memory
}

resource "aws_db_instance" "gateway" {
  #checkov:skip=CKV_AWS_161:the gateway signs in by password, as on any Postgres
  #checkov:skip=CKV_AWS_354:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV_AWS_157:var.database_multi_az, which is on unless somebody turns it off
  #checkov:skip=CKV_AWS_293:var.deletion_protection, which is on unless somebody turns it off
  identifier     = local.name
  engine         = "postgres"
  engine_version = "16" # and the newest of it: minor versions come by themselves, in the maintenance window
  instance_class = var.database_class
  multi_az       = var.database_multi_az

  db_name  = "gateway"
  username = "gateway"
  # Not RDS's own (manage_master_user_password): it changes every seven days, and a task reads its address when it starts.
  password_wo         = local.made.database_password
  password_wo_version = var.database_password_version

  storage_type          = "gp3"
  allocated_storage     = var.database_storage_gb
  max_allocated_storage = 10 * var.database_storage_gb
  storage_encrypted     = true

  db_subnet_group_name   = aws_db_subnet_group.gateway.name
  vpc_security_group_ids = [aws_security_group.database.id]
  publicly_accessible    = false
  ca_cert_identifier     = "rds-ca-rsa2048-g1"
  parameter_group_name   = aws_db_parameter_group.gateway.name

  # Times are UTC. With backups every second of these days can be gone back to (point-in-time recovery).
  backup_retention_period  = var.database_backup_days
  backup_window            = "02:00-03:00"
  maintenance_window       = "sun:03:30-sun:04:30"
  copy_tags_to_snapshot    = true
  delete_automated_backups = !var.deletion_protection

  auto_minor_version_upgrade = true
  deletion_protection        = var.deletion_protection
  skip_final_snapshot        = !var.deletion_protection
  # Of this network: the next one of the same name makes another.
  final_snapshot_identifier = "${local.name}-last-of-${aws_vpc.gateway.id}"

  performance_insights_enabled          = true
  performance_insights_retention_period = 7 # days; what is free of charge
  monitoring_interval                   = 60
  monitoring_role_arn                   = aws_iam_role.database_monitoring.arn
  enabled_cloudwatch_logs_exports       = ["postgresql", "upgrade"]

  tags = local.tags

  lifecycle {
    precondition {
      condition     = local.database_connections <= local.database_max_connections
      error_message = "max_tasks take up to ${local.database_connections} connections during a deployment (ten for each process, and twice as many tasks), and ${var.database_class} has ${local.database_max_connections}: give a larger database_class or fewer max_tasks."
    }
  }

  # The secret first: what may go wrong with it does so before there is a password to keep in it.
  depends_on = [aws_secretsmanager_secret.database_url, aws_cloudwatch_log_group.database, aws_iam_role_policy_attachment.database_monitoring]
}

resource "aws_db_subnet_group" "gateway" {
  name        = local.name
  description = "Private subnets"
  subnet_ids  = [for subnet in aws_subnet.private : subnet.id]

  tags = local.tags
}

# No statement_timeout: it would end a migration, too. The gateway gives its own queries five seconds each.
resource "aws_db_parameter_group" "gateway" {
  name_prefix = "${local.name}-"
  family      = "postgres16"
  description = "The gateway's database"

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }

  parameter {
    name  = "idle_in_transaction_session_timeout"
    value = "10000" # ms; a process that died in a transaction holds its locks no longer
  }

  parameter {
    name  = "log_statement"
    value = "ddl" # migrations, and what people change by hand
  }

  parameter {
    name  = "log_min_duration_statement"
    value = "1000" # ms
  }

  # The values of a slow statement are people's emails and digests of keys: they stay out of the log.
  parameter {
    name  = "log_parameter_max_length"
    value = "0"
  }

  tags = local.tags

  lifecycle {
    create_before_destroy = true
  }
}

# Made here, RDS's logs expire with the others.
resource "aws_cloudwatch_log_group" "database" {
  #checkov:skip=CKV_AWS_158:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV_AWS_338:var.log_retention_days, which is a year unless somebody makes it less
  for_each = toset(["postgresql", "upgrade"])

  name              = "/aws/rds/instance/${local.name}/${each.key}"
  retention_in_days = var.log_retention_days

  tags = local.tags
}
