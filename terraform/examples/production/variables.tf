variable "region" {
  description = "Region that everything is made in."
  type        = string
  default     = "us-east-1"
}

variable "availability_zones" {
  description = "Two zones of the region."
  type        = list(string)
  default     = ["us-east-1a", "us-east-1b"]
}

variable "allowed_cidrs" {
  description = "Who may reach the gateway: your own address until the first account, the admin's, is made."
  type        = list(string)
}

variable "domain_name" {
  description = "Name that clients use."
  type        = string
}

variable "zone_id" {
  description = "Route 53 zone of domain_name; null: certificate_arn is needed, and an address that you enter yourself."
  type        = string
  default     = null
}

variable "certificate_arn" {
  description = "Certificate of domain_name in ACM; null: one is made and proved in zone_id."
  type        = string
  default     = null
}

variable "image_tag" {
  description = "Tag of the image that was pushed."
  type        = string
}

variable "provider_secrets" {
  description = "Providers' keys: the environment variable and the ARN of its secret."
  type        = map(string)
  default     = {}
}

variable "alarm_email" {
  description = "Who is told of alarms."
  type        = string
  default     = null
}
