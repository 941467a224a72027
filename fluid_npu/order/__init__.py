"""Proves from a record of what a job submitted that no buffer is read too early, overwritten or freed while in use."""
