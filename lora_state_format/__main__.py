from lora_state_format.cli import main

main()
