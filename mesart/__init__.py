"""MesaRT: language models far past their training window, on the engine that the machine has."""

__version__ = "0.1.0"
