"""AOT Autograd fusion: the room behind ``memory_efficient_fusion``, and a Dynamo backend of its own."""

from oslo_fusion.aot.backend import Backend, Replacement
from oslo_fusion.aot.room import AotPass, start_compiler

__all__ = ["AotPass", "Backend", "Replacement", "start_compiler"]
