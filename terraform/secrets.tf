# What is secret is made here and known to nobody. But for one it is in no plan and in no state: write-only arguments are
# sent to AWS and forgotten. Terraform's uuid() is 128 bits of the operating system's randomness, new at each apply, so two
# are a secret; they are sent only where the version beside them is not the state's. Hexadecimal digits need no escape in
# an address.
#
# The one is the cache's token, for which version 5 of the provider has no write-only argument. The state knows it, so keep
# the state in an encrypted bucket that is as private as the secrets.

locals {
  made = { for name in ["database_password", "cache_token", "key_pepper", "audit_key"] : name => replace("${uuid()}${uuid()}", "-", "") }

  # What a task is given, by environment variable.
  secrets = {
    DATABASE_URL       = aws_secretsmanager_secret_version.database_url
    REDIS_URL          = aws_secretsmanager_secret_version.redis_url
    GATEWAY_KEY_PEPPER = aws_secretsmanager_secret_version.key_pepper
    GATEWAY_AUDIT_KEY  = aws_secretsmanager_secret_version.audit_key
  }
}

# sslmode=require is TLS with whoever has the database's name in our own network: RDS's certificates are of an authority of
# its own, which no system trusts. An image that holds its bundle
# (https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem) says so by settings = { PGSSLROOTCERT = "its path" };
# from then on no other authority is believed.
resource "aws_secretsmanager_secret" "database_url" {
  #checkov:skip=CKV_AWS_149:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV2_AWS_57:a task reads it when it starts; var.database_password_version makes a new one, with a deployment
  name                    = "${local.name}/database-url"
  description             = "DATABASE_URL of the tasks"
  recovery_window_in_days = var.deletion_protection ? 30 : 0

  tags = local.tags
}

resource "aws_secretsmanager_secret_version" "database_url" {
  secret_id        = aws_secretsmanager_secret.database_url.id
  secret_string_wo = "postgresql://${aws_db_instance.gateway.username}:${local.made.database_password}@${aws_db_instance.gateway.endpoint}/${aws_db_instance.gateway.db_name}?sslmode=require"
  # Another when any of these is. A restored database has the endpoint of the old one, and gets a new password when it is imported.
  secret_string_wo_version = parseint(substr(sha256("${var.database_password_version} ${aws_db_instance.gateway.endpoint} ${aws_db_instance.gateway.resource_id}"), 0, 8), 16)
}

resource "aws_secretsmanager_secret" "redis_url" {
  #checkov:skip=CKV_AWS_149:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV2_AWS_57:a task reads it when it starts; a new token comes with a new cache, which loses nothing that is not in the database
  name                    = "${local.name}/redis-url"
  description             = "REDIS_URL of the tasks"
  recovery_window_in_days = var.deletion_protection ? 30 : 0

  tags = local.tags
}

resource "aws_secretsmanager_secret_version" "redis_url" {
  secret_id     = aws_secretsmanager_secret.redis_url.id
  secret_string = "rediss://:${aws_elasticache_replication_group.gateway.auth_token}@${aws_elasticache_replication_group.gateway.primary_endpoint_address}:${aws_elasticache_replication_group.gateway.port}/0"
}

resource "aws_secretsmanager_secret" "key_pepper" {
  #checkov:skip=CKV_AWS_149:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV2_AWS_57:with another pepper no key of the gateway is known any more
  name                    = "${local.name}/key-pepper"
  description             = "GATEWAY_KEY_PEPPER of the tasks"
  recovery_window_in_days = var.deletion_protection ? 30 : 0

  tags = local.tags
}

resource "aws_secretsmanager_secret_version" "key_pepper" {
  secret_id                = aws_secretsmanager_secret.key_pepper.id
  secret_string_wo         = local.made.key_pepper
  secret_string_wo_version = 1
}

resource "aws_secretsmanager_secret" "audit_key" {
  #checkov:skip=CKV_AWS_149:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV2_AWS_57:with another key no row of usage can be verified that was written before
  name                    = "${local.name}/audit-key"
  description             = "GATEWAY_AUDIT_KEY of the tasks"
  recovery_window_in_days = var.deletion_protection ? 30 : 0

  tags = local.tags
}

resource "aws_secretsmanager_secret_version" "audit_key" {
  secret_id                = aws_secretsmanager_secret.audit_key.id
  secret_string_wo         = local.made.audit_key
  secret_string_wo_version = 1
}
