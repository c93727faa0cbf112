# The examples call the module with what only an owner knows.

mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["us-east-1a", "us-east-1b"]
  allowed_cidrs      = ["203.0.113.7/32"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "staging" {
  command = plan

  module {
    source = "./examples/staging"
  }

  assert {
    condition     = output.url == "https://gateway.example.com" && output.cluster_name == "ai-gateway-staging" && output.service_name == "ai-gateway-staging" && output.log_group_name == "/ai-gateway-staging/gateway"
    error_message = "its outputs are those of the module"
  }
}

run "production" {
  command = plan

  module {
    source = "./examples/production"
  }

  assert {
    condition     = output.url == "https://gateway.example.com" && output.cluster_name == "ai-gateway" && output.log_group_name == "/ai-gateway/gateway"
    error_message = "its outputs are those of the module"
  }
}
