# A limit by address, in front of everything. The gateway limits keys, and who guesses them; this one is for floods that
# would be paid for before the gateway could refuse them.

locals {
  has_firewall = var.waf_requests_per_5_minutes != null
}

resource "aws_wafv2_web_acl" "gateway" {
  #checkov:skip=CKV_AWS_192:there is no Java here; and rules that look for attacks in bodies would refuse prompts about code
  count = local.has_firewall ? 1 : 0

  name  = local.name
  scope = "REGIONAL"

  default_action {
    allow {}
  }

  # What an OpenAI client reads as a rate limit, and waits for.
  custom_response_body {
    key          = "limited"
    content_type = "APPLICATION_JSON"
    content      = jsonencode({ error = { message = "too many requests from this address", type = "rate_limit_error", param = null, code = "rate_limit_exceeded" } })
  }

  rule {
    name     = "requests-of-an-address"
    priority = 1

    action {
      block {
        custom_response {
          response_code            = 429
          custom_response_body_key = "limited"

          response_header {
            name  = "Retry-After"
            value = "60"
          }
        }
      }
    }

    statement {
      rate_based_statement {
        aggregate_key_type    = "IP"
        limit                 = var.waf_requests_per_5_minutes
        evaluation_window_sec = 300
      }
    }

    visibility_config {
      metric_name                = "${local.name}-requests-of-an-address"
      cloudwatch_metrics_enabled = true
      sampled_requests_enabled   = false # samples hold headers, and headers hold keys
    }
  }

  visibility_config {
    metric_name                = local.name
    cloudwatch_metrics_enabled = true
    sampled_requests_enabled   = false
  }

  tags = local.tags
}

resource "aws_wafv2_web_acl_association" "gateway" {
  count = local.has_firewall ? 1 : 0

  web_acl_arn  = aws_wafv2_web_acl.gateway[0].arn
  resource_arn = aws_lb.gateway.arn
}

resource "aws_cloudwatch_log_group" "waf" {
  #checkov:skip=CKV_AWS_158:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV_AWS_338:var.log_retention_days, which is a year unless somebody makes it less
  count = local.has_firewall ? 1 : 0

  name              = "aws-waf-logs-${local.name}" # the only beginning that a firewall writes to
  retention_in_days = var.log_retention_days

  tags = local.tags
}

# Who was refused, and no key: https://docs.aws.amazon.com/waf/latest/developerguide/logging-fields.html
resource "aws_wafv2_web_acl_logging_configuration" "gateway" {
  count = local.has_firewall ? 1 : 0

  resource_arn            = aws_wafv2_web_acl.gateway[0].arn
  log_destination_configs = [aws_cloudwatch_log_group.waf[0].arn]

  logging_filter {
    default_behavior = "DROP"

    filter {
      behavior    = "KEEP"
      requirement = "MEETS_ANY"

      condition {
        action_condition {
          action = "BLOCK"
        }
      }
    }
  }

  redacted_fields {
    single_header {
      name = "authorization"
    }
  }

  redacted_fields {
    single_header {
      name = "x-api-key"
    }
  }

  redacted_fields {
    single_header {
      name = "cookie"
    }
  }
}
