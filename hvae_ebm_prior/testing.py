"""The check of an adapter, under the name users import; it lives in evaluation/adapter_check.py."""

from .evaluation.adapter_check import check_adapter

__all__ = [
    "check_adapter",
]
