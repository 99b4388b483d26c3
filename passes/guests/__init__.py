"""Run passes written for other frameworks as passopt's own: `graphsurgeon_pass` and `ir_pass` declare them."""

from passopt.passes.guests.decorators import graphsurgeon_pass, ir_pass

__all__ = ["graphsurgeon_pass", "ir_pass"]
