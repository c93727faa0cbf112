mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "a_task_may_write_to_one_folder_and_is_nobody" {
  command = apply

  assert {
    condition     = aws_ecs_task_definition.gateway.requires_compatibilities == toset(["FARGATE"]) && aws_ecs_task_definition.gateway.network_mode == "awsvpc" && aws_ecs_task_definition.gateway.cpu == "512" && aws_ecs_task_definition.gateway.memory == "1024"
    error_message = "it is half a processor and a gibibyte on Fargate"
  }

  assert {
    condition     = length(jsondecode(aws_ecs_task_definition.gateway.container_definitions)) == 1 && jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].image == "${aws_ecr_repository.gateway.repository_url}:0.1.0"
    error_message = "it runs the image that was asked for"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].readonlyRootFilesystem && jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].user == "10001:10001" && jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].linuxParameters.capabilities.drop == ["ALL"]
    error_message = "its file system is read-only, its user nobody, its capabilities none"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].ulimits == [{ name = "nofile", softLimit = 65536, hardLimit = 65536 }]
    error_message = "it has as many file descriptors as streams want"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].portMappings[0].containerPort == 3000
    error_message = "it listens on port 3000"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].mountPoints == [{ sourceVolume = "data", containerPath = "/var/lib/ai-gateway", readOnly = false }] && one(aws_ecs_task_definition.gateway.volume).name == "data"
    error_message = "its journal is on a volume of the task, which outlives the container"
  }

  assert {
    condition     = startswith({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_DATA_DIR, "${jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].mountPoints[0].containerPath}/")
    error_message = "the gateway writes there"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].restartPolicy.enabled
    error_message = "a container that ends is started again in its task"
  }

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].healthCheck.command[0] == "CMD" && strcontains(jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].healthCheck.command[3], "3000") && strcontains(jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].healthCheck.command[3], "/health/live")
    error_message = "its health is asked without a shell"
  }
}

run "it_has_time_to_end_its_streams" {
  command = plan

  assert {
    condition     = jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].stopTimeout == 120
    error_message = "it has as long as Fargate grants"
  }

  assert {
    condition     = tonumber({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_DRAIN_TIMEOUT) + 21 <= jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].stopTimeout
    error_message = "streams end 21 seconds before it is killed at the latest: what is still to be said, counted and written takes that long"
  }

  assert {
    condition     = tonumber({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_DRAIN_DELAY) >= aws_lb_target_group.gateway.health_check[0].interval * aws_lb_target_group.gateway.health_check[0].unhealthy_threshold
    error_message = "it serves until the load balancer has seen that it is leaving"
  }

  assert {
    condition     = tonumber(aws_lb_target_group.gateway.deregistration_delay) >= tonumber({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_DRAIN_TIMEOUT)
    error_message = "the load balancer waits as long"
  }

  assert {
    condition     = { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_USAGE_COPY == "redis"
    error_message = "usage has a second copy that outlives the task"
  }

  assert {
    condition     = { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_TRUSTED_PROXIES == "1" && { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_REGISTRATION == "closed" && { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.ENVIRONMENT == "production" && { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_NODES == "10"
    error_message = "it knows where it is"
  }
}

run "secrets_come_by_arn_and_settings_win" {
  command = plan

  variables {
    settings         = { LOG_LEVEL = "debug", GATEWAY_REGISTRATION = "example.com" }
    provider_secrets = { OPENAI_API_KEY = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:openai-AbCdEf" }
  }

  assert {
    condition     = toset(keys({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].secrets : variable.name => variable.valueFrom })) == toset(["DATABASE_URL", "REDIS_URL", "GATEWAY_KEY_PEPPER", "GATEWAY_AUDIT_KEY", "OPENAI_API_KEY"])
    error_message = "these are its secrets"
  }

  assert {
    condition     = { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].secrets : variable.name => variable.valueFrom }.OPENAI_API_KEY == var.provider_secrets.OPENAI_API_KEY && alltrue([for arn in values({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].secrets : variable.name => variable.valueFrom }) : startswith(arn, "arn:aws:secretsmanager:")])
    error_message = "each is the ARN of a secret"
  }

  assert {
    condition     = length(setintersection(keys({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].secrets : variable.name => variable.valueFrom }), keys({ for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }))) == 0
    error_message = "no secret is in the environment as well"
  }

  assert {
    condition     = { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.LOG_LEVEL == "debug" && { for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].environment : variable.name => variable.value }.GATEWAY_REGISTRATION == "example.com"
    error_message = "what an operator sets is set"
  }
}

run "a_deployment_takes_nothing_away_and_goes_back_when_it_fails" {
  command = plan

  assert {
    condition     = aws_ecs_service.gateway.deployment_minimum_healthy_percent == 100 && aws_ecs_service.gateway.deployment_maximum_percent == 200
    error_message = "new tasks are there before the old ones go"
  }

  assert {
    condition     = aws_ecs_service.gateway.deployment_circuit_breaker[0].enable && aws_ecs_service.gateway.deployment_circuit_breaker[0].rollback && aws_ecs_task_definition.gateway.skip_destroy
    error_message = "a deployment that fails goes back to a revision that is still there"
  }

  assert {
    condition     = aws_ecs_service.gateway.health_check_grace_period_seconds >= jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].healthCheck.startPeriod
    error_message = "a task has time to start, also when it migrates the database"
  }

  assert {
    condition     = aws_ecs_service.gateway.force_new_deployment
    error_message = "another kind of capacity is a deployment, and not another service"
  }

  assert {
    condition     = aws_ecs_service.gateway.desired_count == 2 && aws_ecs_service.gateway.availability_zone_rebalancing == "ENABLED"
    error_message = "there are two tasks, in two zones"
  }

  assert {
    condition     = aws_ecs_service.gateway.network_configuration[0].subnets == toset([for subnet in aws_subnet.private : subnet.id]) && aws_ecs_service.gateway.network_configuration[0].security_groups == toset([aws_security_group.service.id]) && !aws_ecs_service.gateway.network_configuration[0].assign_public_ip
    error_message = "tasks are in the private subnets, without an address of the internet"
  }

  assert {
    condition     = one(aws_ecs_service.gateway.load_balancer).target_group_arn == aws_lb_target_group.gateway.arn && one(aws_ecs_service.gateway.load_balancer).container_name == jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].name && one(aws_ecs_service.gateway.load_balancer).container_port == 3000
    error_message = "the load balancer knows them"
  }

  assert {
    condition     = one(aws_ecs_service.gateway.capacity_provider_strategy).capacity_provider == "FARGATE"
    error_message = "nobody takes their machine away"
  }

  assert {
    condition     = !aws_ecs_service.gateway.enable_execute_command
    error_message = "nobody signs in to them"
  }

  assert {
    condition     = one(aws_ecs_cluster.gateway.setting).name == "containerInsights" && one(aws_ecs_cluster.gateway.setting).value != "disabled"
    error_message = "they are counted"
  }
}

run "there_are_as_many_tasks_as_are_needed" {
  command = plan

  assert {
    condition     = aws_appautoscaling_target.gateway.min_capacity == 2 && aws_appautoscaling_target.gateway.max_capacity == 10 && aws_appautoscaling_target.gateway.scalable_dimension == "ecs:service:DesiredCount"
    error_message = "two to ten"
  }

  assert {
    condition     = aws_appautoscaling_target.gateway.resource_id == "service/${aws_ecs_cluster.gateway.name}/${aws_ecs_service.gateway.name}"
    error_message = "of this service"
  }

  assert {
    condition     = aws_appautoscaling_policy.cpu.target_tracking_scaling_policy_configuration[0].predefined_metric_specification[0].predefined_metric_type == "ECSServiceAverageCPUUtilization" && aws_appautoscaling_policy.cpu.target_tracking_scaling_policy_configuration[0].target_value == 60
    error_message = "by CPU"
  }

  assert {
    condition     = aws_appautoscaling_policy.requests.target_tracking_scaling_policy_configuration[0].predefined_metric_specification[0].predefined_metric_type == "ALBRequestCountPerTarget" && aws_appautoscaling_policy.requests.target_tracking_scaling_policy_configuration[0].target_value == 1500
    error_message = "by requests for each target"
  }

  assert {
    condition     = aws_appautoscaling_policy.requests.target_tracking_scaling_policy_configuration[0].predefined_metric_specification[0].resource_label == "${aws_lb.gateway.arn_suffix}/${aws_lb_target_group.gateway.arn_suffix}"
    error_message = "of this load balancer"
  }
}

run "spare_capacity_is_cheaper" {
  command = plan

  variables {
    spot         = true
    min_tasks    = 1
    architecture = "ARM64"
  }

  assert {
    condition     = one(aws_ecs_service.gateway.capacity_provider_strategy).capacity_provider == "FARGATE_SPOT" && contains(aws_ecs_cluster_capacity_providers.gateway.capacity_providers, "FARGATE_SPOT")
    error_message = "it is asked for"
  }

  assert {
    condition     = aws_appautoscaling_target.gateway.min_capacity == 1
    error_message = "one task is enough"
  }

  assert {
    condition     = aws_ecs_service.gateway.desired_count == 2
    error_message = "and how many there are now is left to the policies"
  }

  assert {
    condition     = aws_ecs_task_definition.gateway.runtime_platform[0].cpu_architecture == "ARM64"
    error_message = "on the processor that the image was built for"
  }
}
