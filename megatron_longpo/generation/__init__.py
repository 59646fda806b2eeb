"""Self-generated pairs: documents cut into chunks, questions, answers on chunks and on whole documents."""
