"""Adversarially hardened image classifiers: each room is a link to the folder of its name beside this one."""
