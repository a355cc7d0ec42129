"""Policy, tasks, GRPO loss and rollouts. No Ray."""
