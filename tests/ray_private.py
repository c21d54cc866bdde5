"""Parts of Ray that are not its public interface and that tests use. Nothing else names them."""

from __future__ import annotations

from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.aws.config import DEFAULT_AMI
from ray.autoscaler._private.aws.config import _check_ami as check_ami
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.experimental.internal_kv import _internal_kv_get
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

__all__ = [
    "AUTOSCALER_RESOURCE_REQUEST_CHANNEL",
    "DEFAULT_AMI",
    "AWSNodeProvider",
    "CheckpointManager",
    "StorageContext",
    "_TrainingReport",
    "_internal_kv_get",
    "check_ami",
    "create_package",
    "prepare_config",
    "validate_config",
]
