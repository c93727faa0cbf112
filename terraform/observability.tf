# What the gateway says, and what somebody should be told. Its own metrics are for a Prometheus in this network.

resource "aws_cloudwatch_log_group" "gateway" {
  #checkov:skip=CKV_AWS_158:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  #checkov:skip=CKV_AWS_338:var.log_retention_days, which is a year unless somebody makes it less
  name              = "/${local.name}/gateway"
  retention_in_days = var.log_retention_days

  tags = local.tags
}

resource "aws_cloudwatch_log_metric_filter" "errors" {
  name           = "${local.name}-errors"
  log_group_name = aws_cloudwatch_log_group.gateway.name
  pattern        = "{ $.level = \"error\" || $.level = \"critical\" }"

  metric_transformation {
    namespace     = local.name
    name          = "Errors"
    value         = "1"
    default_value = "0"
    unit          = "Count"
  }
}

resource "aws_sns_topic" "alarms" {
  #checkov:skip=CKV_AWS_26:alarms cannot use the key of AWS (alias/aws/sns) and would be lost; they hold nothing secret
  name = "${local.name}-alarms"

  tags = local.tags
}

resource "aws_sns_topic_subscription" "email" {
  count = var.alarm_email != null ? 1 : 0

  topic_arn = aws_sns_topic.alarms.arn
  protocol  = "email"
  endpoint  = var.alarm_email
}

# --- alarms ----------------------------------------------------------------------------------------------------------

# None for the time that answers take: what the load balancer measures ends with the headers, which the gateway holds
# back until the provider has said something. It is the provider's time.

locals {
  of_load_balancer = { LoadBalancer = aws_lb.gateway.arn_suffix }
  of_targets       = { LoadBalancer = aws_lb.gateway.arn_suffix, TargetGroup = aws_lb_target_group.gateway.arn_suffix }
  of_service       = { ClusterName = aws_ecs_cluster.gateway.name, ServiceName = aws_ecs_service.gateway.name }
  of_database      = { DBInstanceIdentifier = aws_db_instance.gateway.identifier }

  # By name. It is an alarm when the metric is above (or below) the limit in each of so many minutes.
  alarms = merge({
    load-balancer-5xx    = { of = local.of_load_balancer, metric = "AWS/ApplicationELB HTTPCode_ELB_5XX_Count Sum", above = 10, minutes = 3, says = "The load balancer itself refuses: no task is ready, or one closed a connection." }
    unhealthy-tasks      = { of = local.of_targets, metric = "AWS/ApplicationELB UnHealthyHostCount Maximum", above = 0, minutes = 5, says = "A task is not ready (/health/ready says why) and is not replaced." }
    too-few-tasks        = { of = local.of_service, metric = "ECS/ContainerInsights RunningTaskCount Minimum", below = var.min_tasks, minutes = 10, says = "Fewer tasks run than min_tasks: the events of the service say why." }
    service-cpu          = { of = local.of_service, metric = "AWS/ECS CPUUtilization Average", above = 85, minutes = 10, says = "Tasks are busy, and more of them did not help: max_tasks, or cpu." }
    service-memory       = { of = local.of_service, metric = "AWS/ECS MemoryUtilization Maximum", above = 85, minutes = 5, says = "From 85 % the gateway keeps no connections, from 90 % it refuses requests." }
    errors               = { of = {}, metric = "${local.name} Errors Sum", above = 5, minutes = 3, says = "The gateway logs errors; filter its log by level." }
    database-cpu         = { of = local.of_database, metric = "AWS/RDS CPUUtilization Average", above = 80, minutes = 15, says = "The database is busy: Performance Insights says with what." }
    database-storage     = { of = local.of_database, metric = "AWS/RDS FreeStorageSpace Minimum", below = var.database_storage_gb * pow(1024, 3) / 20, minutes = 15, says = "Less than a twentieth of database_storage_gb is free, and it did not grow." }
    database-connections = { of = local.of_database, metric = "AWS/RDS DatabaseConnections Maximum", above = floor(0.8 * local.database_max_connections), minutes = 5, says = "Soon the database refuses connections: a larger class, or fewer tasks." }
    }, merge([for node in local.cache_nodes : {
      "${node}-memory"    = { of = { CacheClusterId = node }, metric = "AWS/ElastiCache DatabaseMemoryUsagePercentage Maximum", above = 75, minutes = 5, says = "Nothing is evicted: a full cache refuses to count, and limits are local then." }
      "${node}-evictions" = { of = { CacheClusterId = node }, metric = "AWS/ElastiCache Evictions Sum", above = 0, minutes = 1, says = "Limits were forgotten: maxmemory-policy is no longer noeviction." }
      "${node}-cpu"       = { of = { CacheClusterId = node }, metric = "AWS/ElastiCache EngineCPUUtilization Average", above = 80, minutes = 10, says = "The cache is busy, and each request waits for it: a larger class." }
  }]...))
  cache_nodes = [for number in range(1, 2 + var.cache_replicas) : format("%s-%03d", local.name, number)]
}

resource "aws_cloudwatch_metric_alarm" "gateway" {
  for_each = local.alarms

  alarm_name          = startswith(each.key, local.name) ? each.key : "${local.name}-${each.key}"
  alarm_description   = each.value.says
  namespace           = split(" ", each.value.metric)[0]
  metric_name         = split(" ", each.value.metric)[1]
  statistic           = split(" ", each.value.metric)[2]
  dimensions          = each.value.of
  comparison_operator = can(each.value.below) ? "LessThanThreshold" : "GreaterThanThreshold"
  threshold           = try(each.value.below, each.value.above)
  period              = 60
  evaluation_periods  = each.value.minutes
  treat_missing_data  = can(each.value.below) ? "breaching" : "notBreaching"
  alarm_actions       = [aws_sns_topic.alarms.arn]
  ok_actions          = [aws_sns_topic.alarms.arn]

  tags = local.tags
}

# A share, because a provider that fails now and then is a 502 here: it is the log that says whose failure it was.
resource "aws_cloudwatch_metric_alarm" "targets_5xx" {
  alarm_name          = "${local.name}-targets-5xx"
  alarm_description   = "More than 5 % of requests fail, for ten minutes: the gateway, or a provider without a fallback."
  comparison_operator = "GreaterThanThreshold"
  threshold           = 5
  evaluation_periods  = 2
  treat_missing_data  = "notBreaching"
  alarm_actions       = [aws_sns_topic.alarms.arn]
  ok_actions          = [aws_sns_topic.alarms.arn]

  metric_query {
    id          = "share"
    label       = "per cent of requests"
    expression  = "IF(requests >= 20, 100 * errors / requests, 0)"
    return_data = true
  }

  dynamic "metric_query" {
    for_each = { errors = "HTTPCode_Target_5XX_Count", requests = "RequestCount" }

    content {
      id = metric_query.key

      metric {
        namespace   = "AWS/ApplicationELB"
        metric_name = metric_query.value
        dimensions  = local.of_targets
        stat        = "Sum"
        period      = 300
      }
    }
  }

  tags = local.tags
}
