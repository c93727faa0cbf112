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

run "logs_are_kept_for_a_time" {
  command = plan

  assert {
    condition     = aws_cloudwatch_log_group.gateway.retention_in_days == 365
    error_message = "a year"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].logConfiguration.logDriver == "awslogs" && jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].logConfiguration.options.awslogs-group == aws_cloudwatch_log_group.gateway.name && jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].logConfiguration.options.mode == "non-blocking"
    error_message = "tasks write there, and wait for nobody"
  }
}

run "somebody_is_told" {
  command = plan

  assert {
    condition     = toset([for alarm in aws_cloudwatch_metric_alarm.gateway : "${alarm.namespace} ${alarm.metric_name}"]) == toset(["AWS/ApplicationELB HTTPCode_ELB_5XX_Count", "AWS/ApplicationELB UnHealthyHostCount", "ECS/ContainerInsights RunningTaskCount", "AWS/ECS CPUUtilization", "AWS/ECS MemoryUtilization", "ai-gateway Errors", "AWS/RDS CPUUtilization", "AWS/RDS FreeStorageSpace", "AWS/RDS DatabaseConnections", "AWS/ElastiCache DatabaseMemoryUsagePercentage", "AWS/ElastiCache Evictions", "AWS/ElastiCache EngineCPUUtilization"])
    error_message = "of each of these"
  }

  assert {
    condition     = alltrue([for alarm in concat(values(aws_cloudwatch_metric_alarm.gateway), [aws_cloudwatch_metric_alarm.targets_5xx]) : alarm.alarm_actions == toset([aws_sns_topic.alarms.arn]) && length(alarm.alarm_description) > 20])
    error_message = "by the topic, and in words"
  }

  assert {
    condition     = alltrue([for alarm in aws_cloudwatch_metric_alarm.gateway : alarm.comparison_operator == (contains(["RunningTaskCount", "FreeStorageSpace"], alarm.metric_name) ? "LessThanThreshold" : "GreaterThanThreshold")])
    error_message = "too few is less, too much is more"
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.gateway["too-few-tasks"].threshold == 2 && aws_cloudwatch_metric_alarm.gateway["too-few-tasks"].treat_missing_data == "breaching"
    error_message = "a service that says nothing has too few tasks"
  }

  assert {
    condition     = toset([for alarm in aws_cloudwatch_metric_alarm.gateway : alarm.dimensions.CacheClusterId if can(alarm.dimensions.CacheClusterId)]) == toset(["ai-gateway-001", "ai-gateway-002"])
    error_message = "of each machine of the cache"
  }

  assert {
    condition     = { for query in aws_cloudwatch_metric_alarm.targets_5xx.metric_query : query.id => try(query.metric[0].metric_name, "") } == { share = "", errors = "HTTPCode_Target_5XX_Count", requests = "RequestCount" }
    error_message = "when a share of the answers are errors"
  }

  assert {
    condition     = aws_cloudwatch_log_metric_filter.errors.log_group_name == aws_cloudwatch_log_group.gateway.name && strcontains(aws_cloudwatch_log_metric_filter.errors.pattern, "error") && aws_cloudwatch_log_metric_filter.errors.metric_transformation[0].namespace == "ai-gateway"
    error_message = "when the log has errors"
  }

  assert {
    condition     = length(aws_sns_topic_subscription.email) == 0
    error_message = "by email only when there is an address"
  }
}

run "by_email" {
  command = plan

  variables {
    alarm_email = "ada@example.com"
  }

  assert {
    condition     = aws_sns_topic_subscription.email[0].protocol == "email" && aws_sns_topic_subscription.email[0].endpoint == "ada@example.com" && aws_sns_topic_subscription.email[0].topic_arn == aws_sns_topic.alarms.arn
    error_message = "when there is an address"
  }
}
