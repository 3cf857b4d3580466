tick()
notify(model)
return { 0, {} }
