"""fedllm's own rounds between processes, with parties that train nothing."""
