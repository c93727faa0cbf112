# One shard: limits and budgets are one script that looks at many keys at once. What it holds can be made anew (rates
# begin at zero, budgets come from the ledger in the database), so a copy in another zone and a snapshot a day are enough.

resource "aws_elasticache_replication_group" "gateway" {
  #checkov:skip=CKV_AWS_191:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV2_AWS_50:var.cache_replicas, which is 1 unless somebody makes it 0
  replication_group_id = local.name
  description          = "Limits, budgets and the second copy of usage of ${local.name}"
  engine               = "valkey"
  engine_version       = "8.0"
  node_type            = var.cache_class
  port                 = 6379
  parameter_group_name = aws_elasticache_parameter_group.gateway.name

  num_cache_clusters         = 1 + var.cache_replicas
  automatic_failover_enabled = var.cache_replicas > 0
  multi_az_enabled           = var.cache_replicas > 0

  subnet_group_name          = aws_elasticache_subnet_group.gateway.name
  security_group_ids         = [aws_security_group.cache.id]
  at_rest_encryption_enabled = true
  transit_encryption_enabled = true
  transit_encryption_mode    = "required"
  auth_token                 = local.made.cache_token

  # UTC
  snapshot_retention_limit   = 7 # days
  snapshot_window            = "02:00-03:00"
  maintenance_window         = "sun:04:30-sun:05:30"
  auto_minor_version_upgrade = true

  tags = local.tags

  lifecycle {
    ignore_changes = [auth_token] # another is made at each apply; the first stays
  }
}

resource "aws_elasticache_subnet_group" "gateway" {
  name        = local.name
  description = "Private subnets"
  subnet_ids  = [for subnet in aws_subnet.private : subnet.id]

  tags = local.tags
}

resource "aws_elasticache_parameter_group" "gateway" {
  name        = "${local.name}-valkey8"
  family      = "valkey8"
  description = "The gateway's cache"

  parameter {
    name  = "maxmemory-policy"
    value = "noeviction" # a limit that is evicted is no limit
  }

  tags = local.tags
}
