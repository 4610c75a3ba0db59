"""CosyVoice-300M in plain PyTorch: the published names, constructor arguments and state-dict keys, our own code.

Source of the behaviour: FunAudioLLM/CosyVoice @ ace7c47.
"""
