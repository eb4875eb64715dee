package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"

	"golang.org/x/crypto/ssh"
)

// The official suite stops and starts a node's kubelet over ssh, by systemctl. Each
// node has a server that knows one key, the administrator's, and only runs commands;
// and a systemctl and a sudo that know as much as the suite asks for.

// systemctl stops and starts services of the node; %s is its conf directory.
const systemctl = `#!/bin/sh
conf=%s
case "$1" in
stop)
	touch "$conf/$2.stop"
	kill "$(cat "$conf/$2.pid")"
	while [ -e "$conf/$2.pid" ]; do sleep 0.1; done
	;;
start)
	rm -f "$conf/$2.stop"
	until [ -e "$conf/$2.pid" ]; do sleep 0.1; done
	;;
show) if [ -e "$conf/$2.pid" ]; then echo active; else echo inactive; fi ;;
*)
	echo "systemctl: $1 is not for this node" >&2
	exit 1
	;;
esac
`

// sudo keeps the path, which the machine's own may not.
const sudo = `#!/bin/sh
case "$1" in
--version) echo sudo ;;
*) exec "$@" ;;
esac
`

// serveSSH runs commands of who has the administrator's key, for as long as node n
// lives.
func (c *cluster) serveSSH(ctx context.Context, n int) error {
	admin, err := readSigner(c.pki("admin.key"))
	if err != nil {
		return err
	}
	host, err := readSigner(c.pki(nodeName(n) + ".key"))
	if err != nil {
		return err
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if !bytes.Equal(key.Marshal(), admin.PublicKey().Marshal()) {
				return nil, errors.New("not the administrator's key")
			}
			return &ssh.Permissions{}, nil
		},
	}
	config.AddHostKey(host)
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", nodeAddress(n)+":22")
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go c.serveConn(ctx, n, conn, config)
	}
}

func readSigner(path string) (ssh.Signer, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ssh.ParsePrivateKey(content)
}

func (c *cluster) serveConn(ctx context.Context, n int, conn net.Conn, config *ssh.ServerConfig) {
	defer conn.Close() //nolint:errcheck // the peer has gone, or will
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return // a stranger
	}
	go ssh.DiscardRequests(requests)
	for offer := range channels {
		if offer.ChannelType() != "session" {
			_ = offer.Reject(ssh.UnknownChannelType, "only sessions")
			continue
		}
		channel, requests, err := offer.Accept()
		if err != nil {
			return
		}
		go c.serveSession(ctx, n, channel, requests)
	}
}

// serveSession runs the one command of a session.
func (c *cluster) serveSession(ctx context.Context, n int, channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close() //nolint:errcheck // its end is all that is left to say
	for r := range requests {
		var command struct{ Line string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &command) != nil {
			_ = r.Reply(false, nil)
			continue
		}
		_ = r.Reply(true, nil)
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command.Line)
		cmd.Env = append(os.Environ(), "PATH="+c.dir(n, "conf/bin")+":"+sbinPath)
		cmd.Stdout, cmd.Stderr = channel, channel.Stderr()
		var status struct{ Code uint32 }
		if err := cmd.Run(); err != nil {
			status.Code = 1
			if exit, ok := errors.AsType[*exec.ExitError](err); ok {
				status.Code = uint32(exit.ExitCode())
			}
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(status))
		return
	}
}
