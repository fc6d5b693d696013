"""Merge after merge on one server: does anything grow that should not, is anything lost?"""
