"""Copy one blob to another within the service: the bytes do not pass through this machine."""

from __future__ import annotations

from azure.core.exceptions import HttpResponseError

from azstoragetorch._blob.client import MAX_COPIED_AT_ONCE, BlobClient, BlobProperties, CopyRange
from azstoragetorch._engine.config import MiB
from azstoragetorch._engine.ranges import ByteRange, block_size_at, split
from azstoragetorch._engine.scope import Scope, on_error
from azstoragetorch._files.description import describe_found, headers_of_copy
from azstoragetorch._files.transfer import CopyOptions, Hooks, copy_blob
from azstoragetorch.exceptions import FatalBlobIOWriteError

COPIED_BLOCK = 64 * MiB  # large enough that requests cost little, small enough that many are copied at once
_NOT_IMPLEMENTED = (500, 501)  # what emulators answer


def copy_on_server(
    source: BlobClient,
    target: BlobClient,
    found: BlobProperties,
    scope: Scope,
    *,
    at_once: int = MAX_COPIED_AT_ONCE,
    block_size: int = COPIED_BLOCK,
) -> None:
    """Replace *target* with the version of *source* that has the properties *found*.

    Content headers, metadata, and a tier that was set are copied. If the service does not implement copying blocks, as
    emulators do not, the bytes pass through this machine.

    Raises:
        BlobChangedError: the source was overwritten; the target is unchanged.
        FatalBlobIOWriteError: a large blob could not be copied; the target is unchanged.
        AzureError: the service refused or could not be reached.
    """
    version = found.version
    description = describe_found(found)
    headers = headers_of_copy(source, description, scope, keeps_tier=True, keeps_tags=False)
    part = source.copy_source(version.etag)
    if version.size <= at_once:
        tier = {name: value for name, value in headers.items() if name == "x-ms-access-tier"}
        target.copy_from(part, properties=tier, scope=scope)
        return
    length = max(block_size, block_size_at(version.size, block_size))
    blocks = [CopyRange(part, span) for span in split(ByteRange(0, version.size), length)]
    writer = target.writer()
    try:
        with on_error(writer.abort), scope.holding(writer.cancel):
            writer.write_blocks(blocks, concurrency=target.config.initial_concurrency)
            writer.commit(md5=found.md5, properties=headers)
    except FatalBlobIOWriteError as error:
        cause = error.__cause__
        if not (isinstance(cause, HttpResponseError) and cause.status_code in _NOT_IMPLEMENTED):
            raise
        copy_blob(source, target, Hooks(scope, lambda _size: None), CopyOptions(is_forced=True))
