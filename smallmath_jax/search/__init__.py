"""Tree search over reasoning steps: pure host code; generating, scoring and running code are passed in."""
