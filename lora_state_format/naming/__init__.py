"""From positions to names: module orders, grouping rules, the verdict on an order, and the evidence.

``docs/evidence.md`` explains the evidence; ``order.decide`` is the verdict.
"""
