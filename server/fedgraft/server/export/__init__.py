"""What is made of a finished run: PEFT folder, merged model, ONNX, attributions."""
