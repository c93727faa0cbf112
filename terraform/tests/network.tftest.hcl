mock_provider "aws" {
  source = "./tests/aws"
}

variables {
  availability_zones = ["eu-central-1a", "eu-central-1b"]
  domain_name        = "gateway.example.com"
  zone_id            = "Z0123456789ABCDEFGHIJ"
  image_tag          = "0.1.0"
}

run "two_zones_each_with_a_public_and_a_private_subnet" {
  command = apply

  assert {
    condition     = toset(keys(aws_subnet.public)) == toset(var.availability_zones) && toset(keys(aws_subnet.private)) == toset(var.availability_zones)
    error_message = "each zone has a public and a private subnet"
  }

  assert {
    condition     = length(distinct([for subnet in concat(values(aws_subnet.public), values(aws_subnet.private)) : subnet.cidr_block])) == 4
    error_message = "subnets have ranges of their own"
  }

  assert {
    condition     = alltrue([for subnet in concat(values(aws_subnet.public), values(aws_subnet.private)) : subnet.map_public_ip_on_launch != true])
    error_message = "nothing gets a public address by itself"
  }

  assert {
    condition     = alltrue([for zone, subnet in aws_subnet.private : aws_route_table_association.private[zone].subnet_id == subnet.id && aws_route_table_association.private[zone].route_table_id == aws_route_table.private[zone].id])
    error_message = "a private subnet has the route table of its zone"
  }

  assert {
    condition     = alltrue([for zone, route in aws_route.nat : route.nat_gateway_id == aws_nat_gateway.gateway[zone].id && route.gateway_id == null])
    error_message = "a private subnet goes out by the NAT gateway of its zone only"
  }

  assert {
    condition     = alltrue([for zone, gateway in aws_nat_gateway.gateway : gateway.subnet_id == aws_subnet.public[zone].id])
    error_message = "NAT gateways are in public subnets"
  }

  assert {
    condition     = aws_route.internet.gateway_id == aws_internet_gateway.gateway.id
    error_message = "public subnets go to the internet"
  }

  assert {
    condition     = aws_vpc_endpoint.s3.vpc_endpoint_type == "Gateway" && length(aws_vpc_endpoint.s3.route_table_ids) == 2
    error_message = "the layers of an image do not pass the NAT gateways"
  }

  assert {
    condition     = aws_flow_log.gateway.vpc_id == aws_vpc.gateway.id && aws_flow_log.gateway.traffic_type == "ALL" && aws_cloudwatch_log_group.flow_log.retention_in_days == 365
    error_message = "who spoke to whom is logged, and kept for a time"
  }
}

run "one_nat_gateway_for_all_zones" {
  command = plan

  variables {
    nat_gateway_per_zone = false
  }

  assert {
    condition     = keys(aws_nat_gateway.gateway) == ["eu-central-1a"] && keys(aws_eip.nat) == ["eu-central-1a"]
    error_message = "there is one, in the first zone"
  }

  assert {
    condition     = toset(keys(aws_route.nat)) == toset(var.availability_zones) && alltrue([for route in aws_route.nat : route.nat_gateway_id == aws_nat_gateway.gateway["eu-central-1a"].id])
    error_message = "all zones go out by it"
  }
}

run "a_zone_more_moves_no_subnet" {
  command = plan

  variables {
    availability_zones = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
  }

  assert {
    condition = [for zone in var.availability_zones : aws_subnet.private[zone].cidr_block] == ["10.20.0.0/20", "10.20.16.0/20", "10.20.32.0/20"] && (
    [for zone in var.availability_zones : aws_subnet.public[zone].cidr_block] == ["10.20.128.0/20", "10.20.144.0/20", "10.20.160.0/20"])
    error_message = "a zone has the ranges of its place in the list"
  }
}

run "security_groups_admit_each_other_by_reference" {
  command = plan

  variables {
    allowed_cidrs = ["203.0.113.7/32", "198.51.100.0/24"]
  }

  assert {
    condition     = toset([for rule in aws_vpc_security_group_ingress_rule.load_balancer_https : rule.cidr_ipv4]) == toset(var.allowed_cidrs) && alltrue([for rule in aws_vpc_security_group_ingress_rule.load_balancer_https : rule.from_port == 443 && rule.to_port == 443])
    error_message = "the load balancer takes HTTPS of those that are allowed"
  }

  assert {
    condition     = toset([for rule in aws_vpc_security_group_ingress_rule.load_balancer_http : rule.cidr_ipv4]) == toset(var.allowed_cidrs) && alltrue([for rule in aws_vpc_security_group_ingress_rule.load_balancer_http : rule.from_port == 80 && rule.to_port == 80])
    error_message = "the load balancer takes HTTP, to redirect it, of those that are allowed"
  }

  assert {
    condition = alltrue([
      for rule in [
        { rule = aws_vpc_security_group_egress_rule.load_balancer_to_service, of = aws_security_group.load_balancer, and = aws_security_group.service, port = 3000 },
        { rule = aws_vpc_security_group_egress_rule.service_to_database, of = aws_security_group.service, and = aws_security_group.database, port = 5432 },
        { rule = aws_vpc_security_group_egress_rule.service_to_cache, of = aws_security_group.service, and = aws_security_group.cache, port = 6379 },
      ] : rule.rule.security_group_id == rule.of.id && rule.rule.referenced_security_group_id == rule.and.id && rule.rule.from_port == rule.port && rule.rule.to_port == rule.port && rule.rule.ip_protocol == "tcp" && rule.rule.cidr_ipv4 == null
    ])
    error_message = "who may speak to whom is said by security group and by one port"
  }

  assert {
    condition = alltrue([
      for rule in [
        { rule = aws_vpc_security_group_ingress_rule.service_from_load_balancer, of = aws_security_group.service, from = aws_security_group.load_balancer, port = 3000 },
        { rule = aws_vpc_security_group_ingress_rule.database_from_service, of = aws_security_group.database, from = aws_security_group.service, port = 5432 },
        { rule = aws_vpc_security_group_ingress_rule.cache_from_service, of = aws_security_group.cache, from = aws_security_group.service, port = 6379 },
      ] : rule.rule.security_group_id == rule.of.id && rule.rule.referenced_security_group_id == rule.from.id && rule.rule.from_port == rule.port && rule.rule.to_port == rule.port && rule.rule.ip_protocol == "tcp" && rule.rule.cidr_ipv4 == null
    ])
    error_message = "the tasks take requests of the load balancer only, the stores of the tasks only"
  }

  assert {
    condition     = aws_vpc_security_group_egress_rule.service_to_internet.from_port == 443 && aws_vpc_security_group_egress_rule.service_to_internet.to_port == 443 && aws_vpc_security_group_egress_rule.service_to_internet.security_group_id == aws_security_group.service.id
    error_message = "the tasks go out by HTTPS only"
  }

  assert {
    condition     = length(aws_default_security_group.gateway.ingress) == 0 && length(aws_default_security_group.gateway.egress) == 0
    error_message = "the default security group lets nothing pass"
  }
}
