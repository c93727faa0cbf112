# HTTPS from clients, and on to the tasks as HTTP/1.1 within the private network. The settings are made for streams and
# for clients that mean harm; README.md says what each is for.

resource "aws_lb" "gateway" {
  #checkov:skip=CKV_AWS_150:var.deletion_protection, which is on unless somebody turns it off
  #checkov:skip=CKV2_AWS_28:the firewall is an option, var.waf_requests_per_5_minutes; keys are limited by the gateway itself
  #checkov:skip=CKV2_AWS_76:there is no Java here; and rules that look for attacks in bodies would refuse prompts about code
  name               = local.name
  internal           = false
  load_balancer_type = "application"
  security_groups    = [aws_security_group.load_balancer.id]
  subnets            = [for subnet in aws_subnet.public : subnet.id]

  # Seconds. A provider that thinks is silent; the gateway says `: ping` every 15, and keeps idle connections for 130,
  # so that it is never the one that closes a connection which a request is on its way to.
  idle_timeout = 120

  desync_mitigation_mode     = "strictest"
  drop_invalid_header_fields = true
  xff_header_processing_mode = "append" # GATEWAY_TRUSTED_PROXIES=1 reads what is appended, and nothing else
  enable_deletion_protection = var.deletion_protection
  # A firewall that cannot be asked lets pass: keys and their limits do not depend on it.
  enable_waf_fail_open = true

  access_logs {
    bucket  = aws_s3_bucket.access_logs.id
    enabled = true
  }

  tags = local.tags

  depends_on = [aws_s3_bucket_policy.access_logs]
}

resource "aws_lb_target_group" "gateway" {
  #checkov:skip=CKV_AWS_378:TLS ends at the load balancer; only it reaches port 3000 of the tasks, in the private subnets
  name             = local.name
  vpc_id           = aws_vpc.gateway.id
  target_type      = "ip"
  port             = 3000
  protocol         = "HTTP"
  protocol_version = "HTTP1"

  # Streams last from a second to minutes: whose turn it is says nothing about who is busy.
  load_balancing_algorithm_type = "least_outstanding_requests"

  # Seconds that open streams go on at a task that gets no new ones; stopTimeout is the same.
  deregistration_delay = 120

  health_check {
    path                = "/health/ready"
    matcher             = "200"
    interval            = 5
    timeout             = 4
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }

  tags = local.tags
}

resource "aws_lb_listener" "https" {
  load_balancer_arn = aws_lb.gateway.arn
  port              = 443
  protocol          = "HTTPS"
  # TLS 1.3 and 1.2 (https://docs.aws.amazon.com/elasticloadbalancing/latest/application/describe-ssl-policies.html).
  ssl_policy      = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn = local.certificate_arn

  # A browser that was here once goes to the page by https only, for a year.
  routing_http_response_strict_transport_security_header_value = "max-age=31536000"

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.gateway.arn
  }

  tags = local.tags
}

# Each task counts its own requests, so a scrape through the load balancer would be of one of them, by chance; and the
# internet need not know which models are used. A Prometheus asks the tasks, from within the network.
resource "aws_lb_listener_rule" "metrics" {
  listener_arn = aws_lb_listener.https.arn
  priority     = 1

  condition {
    path_pattern {
      values = ["/metrics", "/health"]
    }
  }

  action {
    type = "fixed-response"

    fixed_response {
      status_code  = "404"
      content_type = "application/json"
      message_body = jsonencode({ error = { message = "metrics and health are for inside the network", type = "not_found_error", param = null, code = "not_found" } })
    }
  }

  tags = local.tags
}

resource "aws_lb_listener" "http" {
  load_balancer_arn = aws_lb.gateway.arn
  port              = 80
  protocol          = "HTTP"

  default_action {
    type = "redirect"

    redirect {
      protocol    = "HTTPS"
      port        = "443"
      status_code = "HTTP_301"
    }
  }

  tags = local.tags
}

# --- name and certificate --------------------------------------------------------------------------------------------

locals {
  makes_certificate = var.certificate_arn == null
  # The validated one: a listener cannot be made with a certificate that nobody has proved yet.
  certificate_arn = local.makes_certificate ? aws_acm_certificate_validation.gateway[0].certificate_arn : var.certificate_arn
}

resource "aws_acm_certificate" "gateway" {
  count = local.makes_certificate ? 1 : 0

  domain_name       = var.domain_name
  validation_method = "DNS"

  tags = local.tags

  lifecycle {
    create_before_destroy = true # the listener cannot be without one
  }
}

# One name, so one proof. It stays: ACM renews the certificate by it.
resource "aws_route53_record" "certificate" {
  count = local.makes_certificate ? 1 : 0

  zone_id         = var.zone_id
  name            = one(aws_acm_certificate.gateway[0].domain_validation_options).resource_record_name
  type            = one(aws_acm_certificate.gateway[0].domain_validation_options).resource_record_type
  records         = [one(aws_acm_certificate.gateway[0].domain_validation_options).resource_record_value]
  ttl             = 300
  allow_overwrite = true # the proof is the same for each certificate of a name, and may be there from an earlier one
}

resource "aws_acm_certificate_validation" "gateway" {
  count = local.makes_certificate ? 1 : 0

  certificate_arn         = aws_acm_certificate.gateway[0].arn
  validation_record_fqdns = [aws_route53_record.certificate[0].fqdn]
}

resource "aws_route53_record" "gateway" {
  count = var.zone_id != null ? 1 : 0

  zone_id = var.zone_id
  name    = var.domain_name
  type    = "A"

  alias {
    name                   = aws_lb.gateway.dns_name
    zone_id                = aws_lb.gateway.zone_id
    evaluate_target_health = true
  }
}

# --- access logs -----------------------------------------------------------------------------------------------------

resource "aws_s3_bucket" "access_logs" {
  #checkov:skip=CKV_AWS_18:this is where access logs go; logging the reading of logs has no end
  #checkov:skip=CKV_AWS_21:log files are written once and expire; a version of them would only outlive that
  #checkov:skip=CKV_AWS_144:a copy in another region is not worth its price for logs that expire
  #checkov:skip=CKV_AWS_145:load balancers write to buckets with keys of S3 (SSE-S3) only
  #checkov:skip=CKV2_AWS_62:nothing waits for a log file to arrive
  bucket        = "${local.name}-access-logs-${data.aws_caller_identity.current.account_id}-${data.aws_region.current.name}"
  force_destroy = !var.deletion_protection

  tags = local.tags
}

resource "aws_s3_bucket_public_access_block" "access_logs" {
  bucket = aws_s3_bucket.access_logs.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "access_logs" {
  bucket = aws_s3_bucket.access_logs.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "access_logs" {
  bucket = aws_s3_bucket.access_logs.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "access_logs" {
  bucket = aws_s3_bucket.access_logs.id

  rule {
    id     = "expire"
    status = "Enabled"

    filter {}

    expiration {
      days = var.log_retention_days
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

# https://docs.aws.amazon.com/elasticloadbalancing/latest/application/enable-access-logging.html
resource "aws_s3_bucket_policy" "access_logs" {
  bucket = aws_s3_bucket.access_logs.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid       = "LoadBalancersOfThisAccountWrite"
        Effect    = "Allow"
        Principal = { Service = "logdelivery.elasticloadbalancing.amazonaws.com" }
        Action    = "s3:PutObject"
        Resource  = "${aws_s3_bucket.access_logs.arn}/AWSLogs/${data.aws_caller_identity.current.account_id}/*"
      },
      {
        Sid       = "NobodyWithoutTLS"
        Effect    = "Deny"
        Principal = "*"
        Action    = "s3:*"
        Resource  = [aws_s3_bucket.access_logs.arn, "${aws_s3_bucket.access_logs.arn}/*"]
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      },
    ]
  })

  depends_on = [aws_s3_bucket_public_access_block.access_logs]
}
