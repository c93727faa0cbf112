# What an input's validation refuses. Each run gives wrong values for many variables, and every one must be refused.

mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "too_little" {
  command = plan

  variables {
    name                       = "ab"
    vpc_cidr                   = "10.0.0.0/15"
    availability_zones         = ["eu-central-1a"]
    allowed_cidrs              = []
    domain_name                = "localhost"
    zone_id                    = null
    waf_requests_per_5_minutes = 9
    image_tag                  = ""
    architecture               = ""
    memory                     = 1023
    max_tasks                  = 1
    cpu_target                 = 9
    requests_per_task          = 0
    settings                   = { log_level = "debug" }
    provider_secrets           = { OPENAI_API_KEY = "" }
    database_class             = ""
    database_storage_gb        = 19
    database_password_version  = 0
    database_backup_days       = 0
    cache_class                = ""
    cache_replicas             = -1
    log_retention_days         = 0
  }

  expect_failures = [
    var.name, var.vpc_cidr, var.availability_zones, var.allowed_cidrs, var.domain_name, var.certificate_arn,
    var.waf_requests_per_5_minutes, var.image_tag, var.architecture, var.memory, var.max_tasks, var.cpu_target,
    var.requests_per_task, var.settings, var.provider_secrets, var.database_class,
    var.database_storage_gb, var.database_password_version, var.database_backup_days, var.cache_class,
    var.cache_replicas, var.log_retention_days,
  ]
}

run "too_much" {
  command = plan

  variables {
    name                       = "a-name-of-21-letters-"
    vpc_cidr                   = "10.0.0.0/21"
    availability_zones         = ["a", "b", "c", "d", "e"]
    allowed_cidrs              = ["203.0.113.7"]
    domain_name                = "https://gateway.example.com"
    waf_requests_per_5_minutes = 2000000001
    image_tag                  = "latest"
    architecture               = "ARM64/v8"
    memory                     = 4097
    min_tasks                  = 11
    cpu_target                 = 91
    settings                   = { GATEWAY_KEY_PEPPER = "in plain sight" }
    provider_secrets           = { OPENAI_API_KEY = "sk-in-plain-sight" }
    database_class             = "t4g.micro"
    database_storage_gb        = 6554
    database_backup_days       = 36
    cache_class                = "t4g.micro"
    cache_replicas             = 6
    log_retention_days         = 366
  }

  expect_failures = [
    var.name, var.vpc_cidr, var.availability_zones, var.allowed_cidrs, var.domain_name, var.waf_requests_per_5_minutes,
    var.image_tag, var.architecture, var.memory, var.max_tasks, var.cpu_target, var.settings,
    var.provider_secrets, var.database_class, var.database_storage_gb, var.database_backup_days, var.cache_class,
    var.cache_replicas, var.log_retention_days,
  ]
}

run "neither_this_nor_that" {
  command = plan

  variables {
    name               = "Gateway"
    vpc_cidr           = "fd00::/16"
    availability_zones = ["eu-central-1a", "eu-central-1a"]
    allowed_cidrs      = ["0.0.0.0/0", "2001:db8::/32"]
    domain_name        = "Gateway.example.com"
    image_tag          = "0.1.0:1"
    cpu                = 300
    min_tasks          = 0
    settings           = { OPENAI_API_KEY = "sk-in-plain-sight" }
    provider_secrets   = { openai = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:openai-AbCdEf" }
  }

  expect_failures = [
    var.name, var.vpc_cidr, var.availability_zones, var.allowed_cidrs, var.domain_name, var.image_tag, var.cpu, var.min_tasks,
    var.settings, var.provider_secrets,
  ]
}
