output "url" {
  description = "Where the gateway answers; an OpenAI client's base_url is this and /v1."
  value       = "https://${var.domain_name}"
}

output "load_balancer_dns_name" {
  description = "What domain_name is an alias of; where there is no zone_id, give it a CNAME record of this."
  value       = aws_lb.gateway.dns_name
}

output "repository_url" {
  description = "Where the image is pushed to."
  value       = aws_ecr_repository.gateway.repository_url
}

output "cluster_name" {
  description = "Cluster of the service."
  value       = aws_ecs_cluster.gateway.name
}

output "service_name" {
  description = "Service that runs the tasks."
  value       = aws_ecs_service.gateway.name
}

output "log_group_name" {
  description = "Log group of the gateway: one JSON line a request."
  value       = aws_cloudwatch_log_group.gateway.name
}

output "vpc_id" {
  description = "Network, for what is put beside the gateway: a Prometheus, an Ollama."
  value       = aws_vpc.gateway.id
}

output "service_security_group_id" {
  description = "Security group of the tasks, for rules to and from what is put beside them."
  value       = aws_security_group.service.id
}
