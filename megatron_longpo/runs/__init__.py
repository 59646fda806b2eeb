"""Runs seen from outside, by what they write into their folders: reading it, comparing two runs, watching one."""
