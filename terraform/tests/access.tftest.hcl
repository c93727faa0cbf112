# Who may do what: roles, the registry, the secrets.

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

run "a_task_may_do_nothing" {
  command = plan

  assert {
    condition     = aws_ecs_task_definition.gateway.task_role_arn == aws_iam_role.task.arn && aws_iam_role_policy.execution.role != aws_iam_role.task.id
    error_message = "its role is one without a policy"
  }

  assert {
    condition     = alltrue([for statement in concat(jsondecode(aws_iam_role.task.assume_role_policy).Statement, jsondecode(aws_iam_role.execution.assume_role_policy).Statement) : statement.Principal == { Service = "ecs-tasks.amazonaws.com" } && statement.Condition.StringEquals["aws:SourceAccount"] == "123456789012"])
    error_message = "only tasks of this account have it"
  }
}

run "what_starts_tasks_reads_their_secrets_and_no_others" {
  command = plan

  variables {
    provider_secrets = { OPENAI_API_KEY = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:openai-AbCdEf" }
  }

  assert {
    condition     = aws_ecs_task_definition.gateway.execution_role_arn == aws_iam_role.execution.arn && aws_iam_role_policy.execution.role == aws_iam_role.execution.id
    error_message = "it is this policy that starts them"
  }

  assert {
    condition     = toset(flatten([for statement in jsondecode(aws_iam_role_policy.execution.policy).Statement : statement.Action])) == toset(["ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "secretsmanager:GetSecretValue", "logs:CreateLogStream", "logs:PutLogEvents"])
    error_message = "it pulls, reads secrets, and writes a log"
  }

  assert {
    condition     = toset(flatten([for statement in jsondecode(aws_iam_role_policy.execution.policy).Statement : statement.Action if contains(flatten([statement.Resource]), "*")])) == toset(["ecr:GetAuthorizationToken"])
    error_message = "all but one of it of certain things"
  }

  assert {
    condition     = alltrue([for statement in jsondecode(aws_iam_role_policy.execution.policy).Statement : statement.Effect == "Allow" && !strcontains(jsonencode(statement.Action), "*")])
    error_message = "no action is a pattern"
  }

  assert {
    condition     = toset(flatten([for statement in jsondecode(aws_iam_role_policy.execution.policy).Statement : statement.Resource if contains(flatten([statement.Action]), "secretsmanager:GetSecretValue")])) == toset(concat([for variable in jsondecode(aws_ecs_task_definition.gateway.container_definitions)[0].secrets : split(":::", variable.valueFrom)[0]]))
    error_message = "it reads exactly the secrets of the task"
  }
}

run "an_image_does_not_change_and_is_scanned" {
  command = plan

  assert {
    condition     = aws_ecr_repository.gateway.image_tag_mutability == "IMMUTABLE"
    error_message = "a tag is one image for good"
  }

  assert {
    condition     = aws_ecr_repository.gateway.image_scanning_configuration[0].scan_on_push
    error_message = "it is scanned when it is pushed"
  }

  assert {
    condition     = one(aws_ecr_repository.gateway.encryption_configuration).encryption_type == "AES256" && !aws_ecr_repository.gateway.force_delete
    error_message = "it is encrypted, and not destroyed by mistake"
  }

  assert {
    condition     = aws_ecr_lifecycle_policy.gateway.repository == aws_ecr_repository.gateway.name && alltrue([for rule in jsondecode(aws_ecr_lifecycle_policy.gateway.policy).rules : rule.action.type == "expire"])
    error_message = "old images expire"
  }
}

run "secrets_are_known_to_nobody_and_wait_before_they_go" {
  command = plan

  assert {
    condition     = alltrue([for secret in [aws_secretsmanager_secret.database_url, aws_secretsmanager_secret.redis_url, aws_secretsmanager_secret.key_pepper, aws_secretsmanager_secret.audit_key] : secret.recovery_window_in_days == 30])
    error_message = "one that was deleted can be had back for thirty days"
  }

  assert {
    condition     = alltrue([for version in [aws_secretsmanager_secret_version.database_url, aws_secretsmanager_secret_version.key_pepper, aws_secretsmanager_secret_version.audit_key] : version.secret_string_wo == null && version.secret_string_wo_version >= 1 && try(!can(regex("[0-9a-f]{64}", nonsensitive(version.secret_string))), true)])
    error_message = "no state has them"
  }
}
