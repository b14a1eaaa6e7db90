"""A recipe resolved: the graph, each stage's key, and whether it is cached, will run or will resume."""

from luthier.planning.planner import Node, Plan, plan

__all__ = ["Node", "Plan", "plan"]
