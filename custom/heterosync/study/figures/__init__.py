"""Figures of runs and studies, written as PNG and SVG: one small module per family, each drawing plain numbers.

The same numbers give the same files. Colours are told apart by people with any colour vision, and never carry a meaning
alone: a marker, a dash or a name says the same.
"""
