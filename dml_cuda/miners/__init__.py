"""Miners, and what they return."""
