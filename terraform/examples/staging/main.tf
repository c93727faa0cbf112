# To try things out: everything of production, each of it once and small. A zone that fails, or a maintenance of the
# database or of the cache, interrupts it.

terraform {
  required_version = ">= 1.11"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.100, < 6.0"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = {
      Environment = "staging"
      ManagedBy   = "terraform"
    }
  }
}

module "gateway" {
  source = "../.."

  name                = "ai-gateway-staging"
  deletion_protection = false

  availability_zones   = var.availability_zones
  nat_gateway_per_zone = false
  allowed_cidrs        = var.allowed_cidrs

  domain_name     = var.domain_name
  zone_id         = var.zone_id
  certificate_arn = var.certificate_arn

  image_tag        = var.image_tag
  cpu              = 256
  memory           = 512
  min_tasks        = 1
  max_tasks        = 2
  spot             = true
  provider_secrets = var.provider_secrets

  database_class       = "db.t4g.micro"
  database_multi_az    = false
  database_storage_gb  = 20
  database_backup_days = 1

  cache_class    = "cache.t4g.micro"
  cache_replicas = 0

  log_retention_days = 14
  alarm_email        = var.alarm_email
}
