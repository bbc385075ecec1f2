"""What is looked for before step 0, so that nothing trains that is silently wrong: in stores of any origin, and in the model's own
forward passes.
"""
