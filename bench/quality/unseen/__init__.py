"""How right are combinations of labels that no training cell has?"""
