mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "it_is_made_for_streams_and_for_clients_that_mean_harm" {
  command = apply

  assert {
    condition     = !aws_lb.gateway.internal && aws_lb.gateway.load_balancer_type == "application"
    error_message = "it faces the internet"
  }

  assert {
    condition     = aws_lb.gateway.subnets == toset([for subnet in aws_subnet.public : subnet.id]) && aws_lb.gateway.security_groups == toset([aws_security_group.load_balancer.id])
    error_message = "it is in the public subnets, in its own security group"
  }

  assert {
    condition     = aws_lb.gateway.idle_timeout == 120
    error_message = "idle_timeout is 120, less than the 130 seconds that the gateway keeps an idle connection"
  }

  assert {
    condition     = aws_lb.gateway.desync_mitigation_mode == "strictest"
    error_message = "desync_mitigation_mode is strictest"
  }

  assert {
    condition     = aws_lb.gateway.drop_invalid_header_fields
    error_message = "invalid header fields are dropped"
  }

  assert {
    condition     = aws_lb.gateway.xff_header_processing_mode == "append"
    error_message = "the gateway trusts what is appended to X-Forwarded-For"
  }

  assert {
    condition     = aws_lb.gateway.enable_deletion_protection
    error_message = "it is protected from deletion"
  }

  assert {
    condition     = aws_lb.gateway.access_logs[0].enabled && aws_lb.gateway.access_logs[0].bucket == aws_s3_bucket.access_logs.id
    error_message = "access is logged"
  }
}

run "targets_are_tasks_that_are_ready" {
  command = plan

  assert {
    condition     = aws_lb_target_group.gateway.target_type == "ip" && aws_lb_target_group.gateway.port == 3000 && aws_lb_target_group.gateway.protocol == "HTTP" && aws_lb_target_group.gateway.protocol_version == "HTTP1"
    error_message = "tasks are spoken to by HTTP/1.1 on port 3000"
  }

  assert {
    condition     = aws_lb_target_group.gateway.deregistration_delay == "120"
    error_message = "open streams have 120 seconds to end"
  }

  assert {
    condition     = aws_lb_target_group.gateway.load_balancing_algorithm_type == "least_outstanding_requests"
    error_message = "the task with the fewest streams gets the next"
  }

  assert {
    condition     = aws_lb_target_group.gateway.health_check[0].path == "/health/ready" && aws_lb_target_group.gateway.health_check[0].matcher == "200"
    error_message = "a task is asked whether it is ready"
  }

  assert {
    condition     = aws_lb_target_group.gateway.health_check[0].interval == 5 && aws_lb_target_group.gateway.health_check[0].timeout < 5 && aws_lb_target_group.gateway.health_check[0].unhealthy_threshold == 2
    error_message = "a task that is not ready is left out after two of the checks, which are 5 s apart: within GATEWAY_DRAIN_DELAY"
  }
}

run "it_speaks_https_and_sends_others_there" {
  command = plan

  assert {
    condition     = aws_lb_listener.https.port == 443 && aws_lb_listener.https.protocol == "HTTPS" && aws_lb_listener.https.default_action[0].type == "forward" && aws_lb_listener.https.default_action[0].target_group_arn == aws_lb_target_group.gateway.arn
    error_message = "HTTPS is forwarded to the tasks"
  }

  assert {
    condition     = startswith(aws_lb_listener.https.ssl_policy, "ELBSecurityPolicy-TLS13-1-2-") || startswith(aws_lb_listener.https.ssl_policy, "ELBSecurityPolicy-TLS13-1-3-")
    error_message = "TLS is 1.2 or 1.3"
  }

  assert {
    condition     = aws_lb_listener.http.port == 80 && aws_lb_listener.http.default_action[0].type == "redirect" && aws_lb_listener.http.default_action[0].redirect[0].protocol == "HTTPS" && aws_lb_listener.http.default_action[0].redirect[0].status_code == "HTTP_301"
    error_message = "HTTP is redirected for good"
  }

  assert {
    condition     = aws_lb_listener_rule.metrics.listener_arn == aws_lb_listener.https.arn && one(one(aws_lb_listener_rule.metrics.condition).path_pattern).values == toset(["/metrics", "/health"]) && aws_lb_listener_rule.metrics.action[0].fixed_response[0].status_code == "404"
    error_message = "metrics are not for the internet"
  }

  assert {
    condition     = aws_acm_certificate.gateway[0].domain_name == var.domain_name && aws_acm_certificate.gateway[0].validation_method == "DNS" && aws_lb_listener.https.certificate_arn == aws_acm_certificate_validation.gateway[0].certificate_arn
    error_message = "the certificate is made, and used when it is proved"
  }

  assert {
    condition     = aws_route53_record.certificate[0].zone_id == var.zone_id && aws_route53_record.certificate[0].name == "_proof.gateway.example.com."
    error_message = "the proof of the certificate is in the zone"
  }

  assert {
    condition     = aws_route53_record.gateway[0].name == var.domain_name && aws_route53_record.gateway[0].alias[0].name == aws_lb.gateway.dns_name
    error_message = "the name leads to the load balancer"
  }
}

run "without_a_zone_a_certificate_is_brought" {
  command = plan

  variables {
    zone_id         = null
    certificate_arn = "arn:aws:acm:eu-central-1:123456789012:certificate/brought"
  }

  assert {
    condition     = aws_lb_listener.https.certificate_arn == var.certificate_arn
    error_message = "it is the one that is used"
  }

  assert {
    condition     = length(aws_acm_certificate.gateway) == 0 && length(aws_route53_record.certificate) == 0 && length(aws_route53_record.gateway) == 0
    error_message = "no certificate is made, and no record"
  }
}

run "access_logs_are_private_encrypted_and_expire" {
  command = plan

  assert {
    condition     = aws_s3_bucket_public_access_block.access_logs.block_public_acls && aws_s3_bucket_public_access_block.access_logs.block_public_policy && aws_s3_bucket_public_access_block.access_logs.ignore_public_acls && aws_s3_bucket_public_access_block.access_logs.restrict_public_buckets
    error_message = "nothing in it is public"
  }

  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.access_logs.rule).apply_server_side_encryption_by_default[0].sse_algorithm == "AES256"
    error_message = "they are encrypted as load balancers can"
  }

  assert {
    condition     = aws_s3_bucket_lifecycle_configuration.access_logs.rule[0].status == "Enabled" && aws_s3_bucket_lifecycle_configuration.access_logs.rule[0].expiration[0].days == 365
    error_message = "they expire as other logs do"
  }

  assert {
    condition     = jsondecode(aws_s3_bucket_policy.access_logs.policy).Statement[0].Principal.Service == "logdelivery.elasticloadbalancing.amazonaws.com" && endswith(jsondecode(aws_s3_bucket_policy.access_logs.policy).Statement[0].Resource, "/AWSLogs/123456789012/*")
    error_message = "load balancers write them, for this account only"
  }

  assert {
    condition     = jsondecode(aws_s3_bucket_policy.access_logs.policy).Statement[1].Effect == "Deny" && jsondecode(aws_s3_bucket_policy.access_logs.policy).Statement[1].Condition.Bool["aws:SecureTransport"] == "false"
    error_message = "nobody reads or writes them without TLS"
  }

  assert {
    condition     = !aws_s3_bucket.access_logs.force_destroy
    error_message = "they outlive an erroneous destroy"
  }
}
