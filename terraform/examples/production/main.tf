# For what others depend on: nothing that a zone takes along when it fails, and a firewall in front. What is not set
# here is the module's default, which is made for production.

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
      Environment = "production"
      ManagedBy   = "terraform"
    }
  }
}

module "gateway" {
  source = "../.."

  availability_zones = var.availability_zones
  allowed_cidrs      = var.allowed_cidrs

  domain_name     = var.domain_name
  zone_id         = var.zone_id
  certificate_arn = var.certificate_arn

  # Many people behind one address of an office are one address here: 3,000 in five minutes are ten a second.
  waf_requests_per_5_minutes = 3000

  image_tag        = var.image_tag
  provider_secrets = var.provider_secrets

  alarm_email = var.alarm_email
}
