"""Stands for the client of a mail server; it keeps what it is given and sends nothing."""

from email.message import EmailMessage

sent: list[EmailMessage] = []


def send(to: str, subject: str, text: str) -> None:
    """Send a mail: what is sent cannot be taken back."""
    message = EmailMessage()
    message["To"], message["Subject"] = to, subject
    message.set_content(text)
    sent.append(message)
