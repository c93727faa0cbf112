# Two kinds of subnets in each zone: the load balancer and the NAT gateways are in the public ones; the tasks and the
# stores, without an address that the internet could reach, in the private ones.

locals {
  zones     = toset(var.availability_zones)
  nat_zones = var.nat_gateway_per_zone ? local.zones : toset(slice(var.availability_zones, 0, 1))
}

resource "aws_vpc" "gateway" {
  cidr_block           = var.vpc_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true # the stores are known by name, and a fail-over is a new address behind the same name

  tags = merge(local.tags, { Name = local.name })
}

resource "aws_internet_gateway" "gateway" {
  vpc_id = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = local.name })
}

# Sixteenths of the network: private ones from the first, public ones from the ninth. A zone added at the end of the
# list moves nobody.
resource "aws_subnet" "private" {
  for_each = local.zones

  vpc_id            = aws_vpc.gateway.id
  availability_zone = each.key
  cidr_block        = cidrsubnet(var.vpc_cidr, 4, index(var.availability_zones, each.key))

  tags = merge(local.tags, { Name = "${local.name}-private-${each.key}" })
}

resource "aws_subnet" "public" {
  for_each = local.zones

  vpc_id                  = aws_vpc.gateway.id
  availability_zone       = each.key
  cidr_block              = cidrsubnet(var.vpc_cidr, 4, 8 + index(var.availability_zones, each.key))
  map_public_ip_on_launch = false # a load balancer and a NAT gateway bring their own

  tags = merge(local.tags, { Name = "${local.name}-public-${each.key}" })
}

# --- the way out -----------------------------------------------------------------------------------------------------

resource "aws_eip" "nat" {
  for_each = local.nat_zones

  domain = "vpc"

  tags = merge(local.tags, { Name = "${local.name}-${each.key}" })

  depends_on = [aws_internet_gateway.gateway]
}

resource "aws_nat_gateway" "gateway" {
  for_each = local.nat_zones

  allocation_id = aws_eip.nat[each.key].id
  subnet_id     = aws_subnet.public[each.key].id

  tags = merge(local.tags, { Name = "${local.name}-${each.key}" })

  depends_on = [aws_internet_gateway.gateway]
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-public" })
}

resource "aws_route" "internet" {
  route_table_id         = aws_route_table.public.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.gateway.id
}

resource "aws_route_table_association" "public" {
  for_each = local.zones

  route_table_id = aws_route_table.public.id
  subnet_id      = aws_subnet.public[each.key].id
}

resource "aws_route_table" "private" {
  for_each = local.zones

  vpc_id = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-private-${each.key}" })
}

resource "aws_route" "nat" {
  for_each = local.zones

  route_table_id         = aws_route_table.private[each.key].id
  destination_cidr_block = "0.0.0.0/0"
  nat_gateway_id         = aws_nat_gateway.gateway[contains(local.nat_zones, each.key) ? each.key : var.availability_zones[0]].id
}

resource "aws_route_table_association" "private" {
  for_each = local.zones

  route_table_id = aws_route_table.private[each.key].id
  subnet_id      = aws_subnet.private[each.key].id
}

# The layers of an image come from S3. By this endpoint, which is free, they pass no NAT gateway, which is paid by the
# gigabyte (https://docs.aws.amazon.com/AmazonECR/latest/userguide/vpc-endpoints.html).
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = aws_vpc.gateway.id
  vpc_endpoint_type = "Gateway"
  service_name      = "com.amazonaws.${data.aws_region.current.name}.s3"
  route_table_ids   = [for table in aws_route_table.private : table.id]

  tags = merge(local.tags, { Name = "${local.name}-s3" })
}

# --- who may speak to whom -------------------------------------------------------------------------------------------

# What is put into this network without a security group can reach nothing, and cannot be reached.
resource "aws_default_security_group" "gateway" {
  vpc_id = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-default" })
}

resource "aws_security_group" "load_balancer" {
  name        = "${local.name}-load-balancer"
  description = "Load balancer: HTTPS from clients, and on to the tasks"
  vpc_id      = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-load-balancer" })
}

resource "aws_vpc_security_group_ingress_rule" "load_balancer_https" {
  for_each = toset(var.allowed_cidrs)

  security_group_id = aws_security_group.load_balancer.id
  description       = "HTTPS from clients"
  cidr_ipv4         = each.key
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443

  tags = local.tags
}

resource "aws_vpc_security_group_ingress_rule" "load_balancer_http" {
  #checkov:skip=CKV_AWS_260:nothing is served on port 80 but the redirect to https
  for_each = toset(var.allowed_cidrs)

  security_group_id = aws_security_group.load_balancer.id
  description       = "HTTP from clients, which is redirected to HTTPS"
  cidr_ipv4         = each.key
  ip_protocol       = "tcp"
  from_port         = 80
  to_port           = 80

  tags = local.tags
}

resource "aws_vpc_security_group_egress_rule" "load_balancer_to_service" {
  security_group_id            = aws_security_group.load_balancer.id
  description                  = "Requests and health checks"
  referenced_security_group_id = aws_security_group.service.id
  ip_protocol                  = "tcp"
  from_port                    = 3000
  to_port                      = 3000

  tags = local.tags
}

resource "aws_security_group" "service" {
  name        = "${local.name}-service"
  description = "Tasks: requests from the load balancer; providers and the stores"
  vpc_id      = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-service" })
}

resource "aws_vpc_security_group_ingress_rule" "service_from_load_balancer" {
  security_group_id            = aws_security_group.service.id
  description                  = "Requests and health checks"
  referenced_security_group_id = aws_security_group.load_balancer.id
  ip_protocol                  = "tcp"
  from_port                    = 3000
  to_port                      = 3000

  tags = local.tags
}

# Providers and the AWS APIs have no addresses that could be listed, and a security group knows no names. Whoever wants
# a list of names puts a proxy that has one in front (GATEWAY_PROXY) and narrows this rule to it.
resource "aws_vpc_security_group_egress_rule" "service_to_internet" {
  security_group_id = aws_security_group.service.id
  description       = "HTTPS to providers and to AWS"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443

  tags = local.tags
}

resource "aws_vpc_security_group_egress_rule" "service_to_database" {
  security_group_id            = aws_security_group.service.id
  description                  = "PostgreSQL"
  referenced_security_group_id = aws_security_group.database.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432

  tags = local.tags
}

resource "aws_vpc_security_group_egress_rule" "service_to_cache" {
  security_group_id            = aws_security_group.service.id
  description                  = "Valkey"
  referenced_security_group_id = aws_security_group.cache.id
  ip_protocol                  = "tcp"
  from_port                    = 6379
  to_port                      = 6379

  tags = local.tags
}

resource "aws_security_group" "database" {
  name        = "${local.name}-database"
  description = "Database: PostgreSQL from the tasks"
  vpc_id      = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-database" })
}

resource "aws_vpc_security_group_ingress_rule" "database_from_service" {
  security_group_id            = aws_security_group.database.id
  description                  = "PostgreSQL"
  referenced_security_group_id = aws_security_group.service.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432

  tags = local.tags
}

resource "aws_security_group" "cache" {
  name        = "${local.name}-cache"
  description = "Cache: Valkey from the tasks"
  vpc_id      = aws_vpc.gateway.id

  tags = merge(local.tags, { Name = "${local.name}-cache" })
}

resource "aws_vpc_security_group_ingress_rule" "cache_from_service" {
  security_group_id            = aws_security_group.cache.id
  description                  = "Valkey"
  referenced_security_group_id = aws_security_group.service.id
  ip_protocol                  = "tcp"
  from_port                    = 6379
  to_port                      = 6379

  tags = local.tags
}

# --- who spoke to whom -----------------------------------------------------------------------------------------------

resource "aws_flow_log" "gateway" {
  vpc_id                   = aws_vpc.gateway.id
  traffic_type             = "ALL" # what was let through as well: a key that leaks leaves by an allowed connection
  max_aggregation_interval = 600   # seconds; a tenth of the lines, and of the price, of 60
  log_destination          = aws_cloudwatch_log_group.flow_log.arn
  iam_role_arn             = aws_iam_role.flow_log.arn

  tags = merge(local.tags, { Name = local.name })
}

resource "aws_cloudwatch_log_group" "flow_log" {
  #checkov:skip=CKV_AWS_158:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV_AWS_338:var.log_retention_days, which is a year unless somebody makes it less
  name              = "/${local.name}/flow"
  retention_in_days = var.log_retention_days

  tags = local.tags
}

resource "aws_iam_role" "flow_log" {
  name        = "${local.name}-flow-log"
  description = "Flow log of the network: may write to its log group"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "vpc-flow-logs.amazonaws.com" }
      Action    = "sts:AssumeRole"
      # Only for flow logs of this account (https://docs.aws.amazon.com/vpc/latest/userguide/flow-logs-iam-role.html).
      Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.current.account_id } }
    }]
  })

  tags = local.tags
}

resource "aws_iam_role_policy" "flow_log" {
  name = "write"
  role = aws_iam_role.flow_log.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
      Resource = "${aws_cloudwatch_log_group.flow_log.arn}:*"
    }]
  })
}
