from __future__ import annotations


class DeviceStore: ...


class DeviceMemory: ...
