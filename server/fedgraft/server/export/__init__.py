"""The exports of a finished run: PEFT folder, merged model, ONNX, attributions."""
