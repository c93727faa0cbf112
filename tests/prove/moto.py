"""Moto's server, with what moto 5.2 lacks of the calls that terraform/ makes.

Run by the Python of .venv/infra, where moto is: `python -m tests.prove.moto -p PORT`. The module under proof is applied
as it is; what is missing is made up here, in the forms of https://docs.aws.amazon.com/boto3/latest/reference/services.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from importlib import import_module
from typing import Any

LENT = (
    "tags of scalable targets, how a service is balanced and on which capacity, descriptions of rules between security"
    " groups, a database's parameters and Performance Insights, parameter groups and machines of ElastiCache"
)


def lend_tags_to_scalable_targets() -> None:
    """Application Auto Scaling: `Tags` of RegisterScalableTarget, and the three calls about them."""
    responses: Any = import_module("moto.applicationautoscaling.responses").ApplicationAutoScalingResponse
    tags: dict[str, dict[str, str]] = {}
    register: Callable[[Any], str] = responses.register_scalable_target

    def register_scalable_target(self: Any) -> str:
        said = register(self)
        tags.setdefault(json.loads(said)["ScalableTargetARN"], {}).update(self._get_param("Tags") or {})
        return said

    def list_tags_for_resource(self: Any) -> str:
        return json.dumps({"Tags": tags.get(self._get_param("ResourceARN"), {})})

    def tag_resource(self: Any) -> str:
        tags.setdefault(self._get_param("ResourceARN"), {}).update(self._get_param("Tags"))
        return "{}"

    def untag_resource(self: Any) -> str:
        for name in self._get_param("TagKeys"):
            tags.get(self._get_param("ResourceARN"), {}).pop(name, None)
        return "{}"

    for call in (register_scalable_target, list_tags_for_resource, tag_resource, untag_resource):
        setattr(responses, call.__name__, call)


def lend_capacity_to_services() -> None:
    responses: Any = import_module("moto.ecs.responses").EC2ContainerServiceResponse
    create: Callable[[Any], Any] = responses.create_service

    def create_service(self: Any) -> Any:
        said = create(self)
        service = said.result["service"]
        service.launch_type = self._get_param("launchType")
        service.deployment_controller = self._get_param("deploymentController")
        service.capacity_provider_strategy = self._get_param("capacityProviderStrategy")
        service.availability_zone_rebalancing = self._get_param("availabilityZoneRebalancing")
        service.health_check_grace_period_seconds = self._get_param("healthCheckGracePeriodSeconds")
        return said

    responses.create_service = create_service


def lend_descriptions_to_rules() -> None:
    """Of rules that name a security group; those that name addresses have theirs."""
    rule: Any = import_module("moto.ec2.models.security_groups").SecurityGroupRule
    rule.description = property(lambda self: {**self.source_group, **self.ip_range}.get("Description"))


def lend_what_is_set_to_databases() -> None:
    """Says the digest of each password that a database is given: AWS tells nobody, and the proof compares it."""
    database: Any = import_module("moto.rds.models").DBInstance
    responses: Any = import_module("moto.rds.responses").RDSResponse
    make: Callable[..., None] = database.__init__
    password: Any = database.master_user_password

    def init(self: Any, *arguments: Any, **given: Any) -> None:
        make(self, *arguments, **given)
        self.performance_insights_enabled = given.get("enable_performance_insights", False)
        self.performance_insights_retention_period = given.get("performance_insights_retention_period")

    def take(self: Any, value: str) -> None:
        print(f"password {sha256(value.encode()).hexdigest()}", flush=True)
        password.fset(self, value)

    def describe_db_parameters(self: Any) -> Any:
        name = {"db_parameter_group_name": self.params.get("DBParameterGroupName")}
        [group] = self.backend.describe_db_parameter_groups(name)
        return _answer({"Parameters": [{**one, "Source": "user"} for one in group.parameters.values()]})

    database.__init__ = init
    database.master_user_password = password.setter(take)
    responses.describe_db_parameters = describe_db_parameters


_GROUPS: dict[str, dict[str, Any]] = {}  # parameter groups of ElastiCache by name
_PARAMETERS: dict[str, dict[str, str]] = {}  # what each of them sets


def lend_parameter_groups_to_caches() -> None:
    responses: Any = import_module("moto.elasticache.responses").ElastiCacheResponse
    backend: Any = import_module("moto.elasticache.models").ElastiCacheBackend
    listed: Callable[[Any, str], Any] = backend.list_tags_for_resource

    def list_tags_for_resource(self: Any, arn: str) -> Any:
        if ":parametergroup:" in arn:
            return self.tagging_service.list_tags_for_resource(arn)
        return listed(self, arn)

    backend.list_tags_for_resource = list_tags_for_resource
    for call in (
        create_cache_parameter_group,
        describe_cache_parameter_groups,
        modify_cache_parameter_group,
        describe_cache_parameters,
        delete_cache_parameter_group,
    ):
        setattr(responses, call.__name__, call)


def create_cache_parameter_group(self: Any) -> Any:
    name = self._get_param("CacheParameterGroupName")
    arn = f"arn:aws:elasticache:{self.region}:{self.current_account}:parametergroup:{name}"
    _GROUPS[name] = {
        "CacheParameterGroupName": name,
        "CacheParameterGroupFamily": self._get_param("CacheParameterGroupFamily"),
        "Description": self._get_param("Description"),
        "ARN": arn,
    }
    _PARAMETERS[name] = {}
    self.elasticache_backend.add_tags_to_resource(arn, self._get_param("Tags", []))
    return _answer({"CacheParameterGroup": _GROUPS[name]})


def describe_cache_parameter_groups(self: Any) -> Any:
    name = self._get_param("CacheParameterGroupName")
    if name not in _GROUPS:
        raise import_module("moto.elasticache.exceptions").CacheSubnetGroupNotFound(name)  # a 404, as any other
    return _answer({"CacheParameterGroups": [_GROUPS[name]]})


def modify_cache_parameter_group(self: Any) -> Any:
    name = self._get_param("CacheParameterGroupName")
    for given in self._get_param("ParameterNameValues", []):
        _PARAMETERS[name][given["ParameterName"]] = given["ParameterValue"]
    return _answer({"CacheParameterGroupName": name})


def describe_cache_parameters(self: Any) -> Any:
    known = _PARAMETERS[self._get_param("CacheParameterGroupName")].items()
    return _answer({"Parameters": [{"ParameterName": name, "ParameterValue": value} for name, value in known]})


def delete_cache_parameter_group(self: Any) -> Any:
    _GROUPS.pop(self._get_param("CacheParameterGroupName"), None)
    return _answer({})


def _answer(said: Mapping[str, Any]) -> Any:
    return import_module("moto.core.responses").ActionResult(said)


def lend_machines_to_replication_groups() -> None:
    """DescribeCacheClusters knows those that a replication group is made of, and what is deleted goes."""
    responses: Any = import_module("moto.elasticache.responses").ElastiCacheResponse
    backend: Any = import_module("moto.elasticache.models").ElastiCacheBackend
    describe: Callable[..., list[Any]] = backend.describe_cache_clusters

    def describe_cache_clusters(self: Any, cache_cluster_id: str | None = None) -> list[Any]:
        for group in self.replication_groups.values():
            if cache_cluster_id is not None and cache_cluster_id in group.member_clusters:
                return [_machine(cache_cluster_id, group)]
        return describe(self, cache_cluster_id)

    create: Callable[..., Any] = backend.create_replication_group

    def create_replication_group(self: Any, **given: Any) -> Any:
        return create(self, **{**given, "replicas_per_node_group": (given["num_cache_clusters"] or 1) - 1})

    delete: Callable[..., Any] = backend.delete_replication_group

    def delete_replication_group(self: Any, replication_group_id: str, **given: Any) -> Any:
        group = delete(self, replication_group_id, **given)
        del self.replication_groups[replication_group_id]
        return group

    def delete_cache_subnet_group(self: Any) -> Any:
        self.elasticache_backend.cache_subnet_groups.pop(self._get_param("CacheSubnetGroupName"), None)
        return _answer({})

    responses.delete_cache_subnet_group = delete_cache_subnet_group
    backend.describe_cache_clusters = describe_cache_clusters
    backend.delete_replication_group = delete_replication_group
    backend.create_replication_group = create_replication_group


def _machine(name: str, group: Any) -> dict[str, Any]:
    return {
        "CacheClusterId": name,
        "CacheClusterStatus": "available",
        "ReplicationGroupId": group.replication_group_id,
        "CacheNodeType": group.cache_node_type,
        "Engine": group.engine,
        "EngineVersion": f"{group.engine_version}.0",
        "CacheParameterGroup": {"CacheParameterGroupName": group.cache_parameter_group_name},
        "CacheSubnetGroupName": group.cache_subnet_group_name,
        "SecurityGroups": [{"SecurityGroupId": one, "Status": "active"} for one in group.security_group_ids or []],
        "PreferredMaintenanceWindow": group.preferred_maintenance_window,
        "AutoMinorVersionUpgrade": group.auto_minor_version_upgrade in (True, "true"),
        "TransitEncryptionMode": group.transit_encryption_mode,
        "TransitEncryptionEnabled": group.transit_encryption_enabled,
        "AtRestEncryptionEnabled": group.at_rest_encryption_enabled,
        "SnapshotWindow": group.snapshot_window,
        "SnapshotRetentionLimit": group.snapshot_retention_limit,
        "ARN": group.arn.replace(f":replicationgroup:{group.replication_group_id}", f":cluster:{name}"),
    }


if __name__ == "__main__":
    lend_tags_to_scalable_targets()
    lend_capacity_to_services()
    lend_descriptions_to_rules()
    lend_what_is_set_to_databases()
    lend_parameter_groups_to_caches()
    lend_machines_to_replication_groups()
    import_module("moto.server").main()
