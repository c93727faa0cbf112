mock_provider "aws" {
  source          = "./tests/aws"
  override_during = plan # so that a plan knows what is made up
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "it_is_an_option" {
  command = plan

  assert {
    condition     = length(aws_wafv2_web_acl.gateway) == 0 && length(aws_wafv2_web_acl_association.gateway) == 0 && length(aws_cloudwatch_log_group.waf) == 0 && length(aws_wafv2_web_acl_logging_configuration.gateway) == 0
    error_message = "nothing of it is made, or paid, unless it is asked for"
  }
}

run "it_refuses_an_address_that_asks_too_often" {
  command = plan

  variables {
    waf_requests_per_5_minutes = 3000
  }

  assert {
    condition     = one(aws_wafv2_web_acl.gateway[0].rule).statement[0].rate_based_statement[0].limit == 3000 && one(aws_wafv2_web_acl.gateway[0].rule).statement[0].rate_based_statement[0].aggregate_key_type == "IP" && one(aws_wafv2_web_acl.gateway[0].rule).statement[0].rate_based_statement[0].evaluation_window_sec == 300
    error_message = "it counts the requests of an address in five minutes"
  }

  assert {
    condition     = one(aws_wafv2_web_acl.gateway[0].rule).action[0].block[0].custom_response[0].response_code == 429
    error_message = "it answers as a rate limit does"
  }

  assert {
    condition     = aws_wafv2_web_acl.gateway[0].scope == "REGIONAL" && length(aws_wafv2_web_acl.gateway[0].default_action[0].allow) == 1
    error_message = "all others pass"
  }

  assert {
    condition     = aws_wafv2_web_acl_association.gateway[0].resource_arn == aws_lb.gateway.arn && aws_wafv2_web_acl_association.gateway[0].web_acl_arn == aws_wafv2_web_acl.gateway[0].arn
    error_message = "it stands in front of the load balancer"
  }

  assert {
    condition     = startswith(aws_cloudwatch_log_group.waf[0].name, "aws-waf-logs-") && toset([for field in aws_wafv2_web_acl_logging_configuration.gateway[0].redacted_fields : field.single_header[0].name]) == toset(["authorization", "x-api-key", "cookie"])
    error_message = "who is refused is logged, and no key"
  }
}
