output "url" {
  description = "Where the gateway answers; an OpenAI client's base_url is this and /v1."
  value       = module.gateway.url
}

output "load_balancer_dns_name" {
  description = "What domain_name is an alias of; where there is no zone_id, give it a CNAME record of this."
  value       = module.gateway.load_balancer_dns_name
}

output "repository_url" {
  description = "Where the image is pushed to."
  value       = module.gateway.repository_url
}

output "cluster_name" {
  description = "Cluster of the service."
  value       = module.gateway.cluster_name
}

output "service_name" {
  description = "Service that runs the tasks."
  value       = module.gateway.service_name
}

output "log_group_name" {
  description = "Log group of the gateway: one JSON line a request."
  value       = module.gateway.log_group_name
}

output "vpc_id" {
  description = "Network, for what is put beside the gateway: a Prometheus, an Ollama."
  value       = module.gateway.vpc_id
}

output "service_security_group_id" {
  description = "Security group of the tasks, for rules to and from what is put beside them."
  value       = module.gateway.service_security_group_id
}
