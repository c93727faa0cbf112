# What runs: tasks of one container each, started, watched and replaced by ECS.

resource "aws_ecs_cluster" "gateway" {
  name = local.name

  setting {
    name  = "containerInsights"
    value = "enabled" # the alarm for too few tasks reads it
  }

  tags = local.tags
}

resource "aws_ecs_cluster_capacity_providers" "gateway" {
  cluster_name       = aws_ecs_cluster.gateway.name
  capacity_providers = ["FARGATE", "FARGATE_SPOT"]
}

locals {
  # Of the stores nothing is kept here, and what is written is the journal of usage alone.
  data_folder = "/var/lib/ai-gateway"

  # Processes of a task. 0 is one for each core that is seen, and Fargate shows two where it grants less.
  workers_set = lookup(var.settings, "GATEWAY_WORKERS", "1")
  workers     = local.workers_set == "0" ? max(2, var.cpu / 1024) : tonumber(local.workers_set)

  environment = merge({
    HOST                    = "0.0.0.0"
    PORT                    = "3000"
    ENVIRONMENT             = "production"
    GATEWAY_DATA_DIR        = "${local.data_folder}/data"
    GATEWAY_NODES           = tostring(local.workers * var.max_tasks) # while Redis is gone each grants its share: rather too little than too much
    GATEWAY_TRUSTED_PROXIES = "1"                                     # the load balancer
    GATEWAY_REGISTRATION    = "closed"                                # the first account alone, which is the admin
    # The journal outlives a container that is started again in its task, and not the task: its second copy is in the
    # cache, and whichever task is there adopts it.
    GATEWAY_USAGE_COPY = "redis"
    # Seconds. After SIGTERM a task serves for the delay, until the load balancer has seen that it is not ready (two
    # checks, five seconds apart), and its streams go on until the time-out, of which the delay is a part. Last
    # words, counts, usage rows and a database that hangs take up to 21 more; stopTimeout ends what is left after 120.
    GATEWAY_DRAIN_DELAY   = "10"
    GATEWAY_DRAIN_TIMEOUT = "95"
    TMPDIR                = local.data_folder # the only folder that can be written to
  }, var.settings)

  container = {
    name      = "gateway"
    image     = "${aws_ecr_repository.gateway.repository_url}:${var.image_tag}"
    essential = true

    user                   = "10001:10001"
    readonlyRootFilesystem = true
    linuxParameters        = { capabilities = { drop = ["ALL"] } }
    ulimits                = [{ name = "nofile", softLimit = 65536, hardLimit = 65536 }]
    portMappings           = [{ containerPort = 3000, hostPort = 3000, protocol = "tcp" }]
    mountPoints            = [{ sourceVolume = "data", containerPath = local.data_folder, readOnly = false }]

    environment = [for name, value in local.environment : { name = name, value = value }]
    # Of a certain version: a task that is replaced gets what its deployment was tried with.
    secrets = concat(
      [for name, secret in local.secrets : { name = name, valueFrom = "${secret.arn}:::${secret.version_id}" }],
      [for name, arn in var.provider_secrets : { name = name, valueFrom = arn }],
    )

    # A process that ends is started again at once, on its journal; only then is the task replaced.
    restartPolicy = { enabled = true, restartAttemptPeriod = 60 }
    stopTimeout   = 120 # seconds; the most that Fargate grants

    # Of the process alone, and without a shell. Whether it can serve is the load balancer's question.
    healthCheck = {
      command     = ["CMD", "python", "-ISc", "import socket; s = socket.create_connection(('127.0.0.1', 3000), 4); s.sendall(b'GET /health/live HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in s.recv(64))"]
      interval    = 30
      timeout     = 5
      retries     = 3
      startPeriod = 300 # the most; a start waits for the database, and for migrations
    }

    # A log that is slow loses lines, and no request waits for it. What is owed is in the journal, not in the log.
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        awslogs-group         = aws_cloudwatch_log_group.gateway.name
        awslogs-region        = data.aws_region.current.name
        awslogs-stream-prefix = "gateway"
        mode                  = "non-blocking"
        max-buffer-size       = "25m"
      }
    }
  }
}

resource "aws_ecs_task_definition" "gateway" {
  family                   = local.name
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = var.cpu
  memory                   = var.memory
  execution_role_arn       = aws_iam_role.execution.arn
  task_role_arn            = aws_iam_role.task.arn
  container_definitions    = jsonencode([local.container])

  runtime_platform {
    operating_system_family = "LINUX"
    cpu_architecture        = var.architecture
  }

  # Of the 20 GiB of a task; the journal takes 2 at most. The folder is the image's VOLUME, and so belongs to its user
  # (https://docs.aws.amazon.com/AmazonECS/latest/developerguide/bind-mounts.html).
  volume {
    name = "data"
  }

  # A deployment that fails goes back to the revision before, which has to be there.
  skip_destroy = true

  tags = local.tags
}

resource "aws_ecs_service" "gateway" {
  name                          = local.name
  cluster                       = aws_ecs_cluster.gateway.id
  task_definition               = aws_ecs_task_definition.gateway.arn
  desired_count                 = var.min_tasks
  availability_zone_rebalancing = "ENABLED"
  enable_execute_command        = false # there is no shell to run
  force_new_deployment          = true  # without it another `spot` is another service, and none in between
  propagate_tags                = "SERVICE"

  # New tasks first, then the old ones go.
  deployment_minimum_healthy_percent = 100
  deployment_maximum_percent         = 200
  health_check_grace_period_seconds  = 300

  deployment_circuit_breaker {
    enable   = true
    rollback = true
  }

  capacity_provider_strategy {
    capacity_provider = var.spot ? "FARGATE_SPOT" : "FARGATE"
    weight            = 1
  }

  network_configuration {
    subnets          = [for subnet in aws_subnet.private : subnet.id]
    security_groups  = [aws_security_group.service.id]
    assign_public_ip = false
  }

  load_balancer {
    target_group_arn = aws_lb_target_group.gateway.arn
    container_name   = local.container.name
    container_port   = 3000
  }

  tags = local.tags

  lifecycle {
    ignore_changes = [desired_count] # the policies below change it
  }

  # A target group without a listener takes no tasks, and a role without its policy starts none.
  depends_on = [aws_ecs_cluster_capacity_providers.gateway, aws_iam_role_policy.execution, aws_lb_listener.https]
}

# --- how many --------------------------------------------------------------------------------------------------------

resource "aws_appautoscaling_target" "gateway" {
  service_namespace  = "ecs"
  resource_id        = "service/${aws_ecs_cluster.gateway.name}/${aws_ecs_service.gateway.name}"
  scalable_dimension = "ecs:service:DesiredCount"
  min_capacity       = var.min_tasks
  max_capacity       = var.max_tasks

  tags = local.tags
}

resource "aws_appautoscaling_policy" "cpu" {
  name               = "cpu"
  policy_type        = "TargetTrackingScaling"
  service_namespace  = aws_appautoscaling_target.gateway.service_namespace
  resource_id        = aws_appautoscaling_target.gateway.resource_id
  scalable_dimension = aws_appautoscaling_target.gateway.scalable_dimension

  target_tracking_scaling_policy_configuration {
    target_value       = var.cpu_target
    scale_out_cooldown = 60
    scale_in_cooldown  = 300 # a task that goes takes two minutes of streams to go

    predefined_metric_specification {
      predefined_metric_type = "ECSServiceAverageCPUUtilization"
    }
  }
}

resource "aws_appautoscaling_policy" "requests" {
  name               = "requests"
  policy_type        = "TargetTrackingScaling"
  service_namespace  = aws_appautoscaling_target.gateway.service_namespace
  resource_id        = aws_appautoscaling_target.gateway.resource_id
  scalable_dimension = aws_appautoscaling_target.gateway.scalable_dimension

  target_tracking_scaling_policy_configuration {
    target_value       = var.requests_per_task
    scale_out_cooldown = 60
    scale_in_cooldown  = 300

    predefined_metric_specification {
      predefined_metric_type = "ALBRequestCountPerTarget"
      resource_label         = "${aws_lb.gateway.arn_suffix}/${aws_lb_target_group.gateway.arn_suffix}"
    }
  }
}
