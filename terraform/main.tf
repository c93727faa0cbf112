# An OpenAI-compatible gateway on AWS: load balancer -> tasks on Fargate -> PostgreSQL and Valkey. README.md takes a
# newcomer from an account to a streaming request.

locals {
  name = var.name
  tags = merge(var.tags, { Application = var.name })
}

data "aws_region" "current" {}

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}
