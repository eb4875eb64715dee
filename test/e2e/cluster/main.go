// Command cluster brings up a real Kubernetes on one machine, with no container
// engine, no registry and no network: each node is a set of namespaces.
//
// A node has its own root directory, network, processes and cgroups; the kernel
// and with it the loop devices are shared, as between the nodes of kind. Node 1
// also runs the control plane. On the machine itself one veth and two routes are
// visible, and files below the state directory.
//
// What surprises, and why things are as they are:
//
//   - PID 1 of a node is this program. Its death takes the node's processes and
//     mounts with it, like a power cut; what is on the node's disk stays.
//   - Nothing that a node or a pod writes reaches the machine: /usr is read-only,
//     /etc a copy, /var a directory of the node's, /run and /tmp are tmpfs.
//   - Machines without CAP_SYS_RESOURCE are served: see containerdConfig and
//     kubeletConfig, and maskSysctls.
//   - Loop devices outlive a mount namespace. Those over the node's files are
//     found and cleared when a node has been killed, see loops_linux.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

const usage = `usage: cluster [flags] COMMAND

  up                        start the cluster, or those of its nodes that are off
  down                      end the cluster and remove everything it left
  status                    show the nodes
  load FILE...              import image archives on every node
  exec NODE COMMAND...      run a command inside a node
  kubectl ARGUMENT...       run kubectl as administrator
  start-node NODE           boot a node
  kill-node NODE            cut its power
  stop-node NODE            shut it down: pods first, then the rest
  stop-service NODE NAME    end kubelet, containerd, ... and keep it down
  start-service NODE NAME   let it run again
  kill-service NODE NAME    kill -9; it is started again after a moment

flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	var code exitError
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

// exitError is what a command that was run for the caller ended with.
type exitError int

func (c exitError) Error() string { return "exit code " + strconv.Itoa(int(c)) }

func run(ctx context.Context) error {
	var c cluster
	flag.StringVar(&c.state, "state", stateDir(), "directory for all that the nodes keep")
	flag.StringVar(&c.bin, "bin", os.Getenv("CSI_LOOP_E2E_BIN"), "directory of the binaries (default: $CSI_LOOP_E2E_BIN)")
	flag.StringVar(&c.images, "images", "", "directory of image archives that up imports (default: images in -bin)")
	flag.IntVar(&c.size, "nodes", 3, "how many nodes")
	flag.StringVar(&c.pool, "pool", "", "give each node a filesystem of its own at /var/lib/csi-loop: xfs, btrfs or ext4")
	flag.StringVar(&c.proxy, "proxy-mode", "nftables", "how kube-proxy works: nftables or iptables")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		flag.PrintDefaults()
	}
	flag.Parse()
	if err := c.recall(); err != nil {
		return err
	}
	if err := c.resolve(); err != nil {
		return err
	}
	name, args := flag.Arg(0), flag.Args()
	command, ok := commands[name]
	if !ok || len(args)-1 < command.args {
		flag.Usage()
		return exitError(2)
	}
	return command.run(ctx, &c, args[1:])
}

type command struct {
	args int // at least
	run  func(context.Context, *cluster, []string) error
}

var commands = map[string]command{
	"up":     {0, func(ctx context.Context, c *cluster, _ []string) error { return c.up(ctx) }},
	"down":   {0, func(ctx context.Context, c *cluster, _ []string) error { return c.down(ctx) }},
	"status": {0, func(ctx context.Context, c *cluster, _ []string) error { return c.status(ctx) }},
	"load":   {1, func(ctx context.Context, c *cluster, args []string) error { return c.loadEverywhere(ctx, args) }},
	"exec": {2, onNode(func(ctx context.Context, c *cluster, n int, args []string) error {
		return interactive(c.in(ctx, n, args...))
	})},
	"kubectl": {0, func(ctx context.Context, c *cluster, args []string) error {
		return interactive(c.kubectl(ctx, args...))
	}},
	"start-node": {1, onNode(func(ctx context.Context, c *cluster, n int, _ []string) error { return c.start(ctx, n) })},
	"kill-node":  {1, onNode(func(ctx context.Context, c *cluster, n int, _ []string) error { return c.kill(ctx, n) })},
	"stop-node":  {1, onNode(func(ctx context.Context, c *cluster, n int, _ []string) error { return c.stop(ctx, n) })},
	"stop-service": {2, onNode(func(ctx context.Context, c *cluster, n int, args []string) error {
		return c.stopService(ctx, n, args[0])
	})},
	"start-service": {2, onNode(func(_ context.Context, c *cluster, n int, args []string) error {
		return c.startService(n, args[0])
	})},
	"kill-service": {2, onNode(func(ctx context.Context, c *cluster, n int, args []string) error {
		return c.signalService(ctx, n, args[0], "KILL")
	})},
	// Not for people: the two steps into a node's namespaces, and a service in them.
	"spawn": {1, onNode(func(_ context.Context, c *cluster, n int, _ []string) error { return c.spawn(n) })},
	"sshd":  {1, onNode(func(ctx context.Context, c *cluster, n int, _ []string) error { return c.serveSSH(ctx, n) })},
	"init":  {1, onNode(func(_ context.Context, c *cluster, n int, _ []string) error { return c.init(n) })},
}

func onNode(f func(context.Context, *cluster, int, []string) error) func(context.Context, *cluster, []string) error {
	return func(ctx context.Context, c *cluster, args []string) error {
		n, err := strconv.Atoi(strings.TrimPrefix(args[0], "node"))
		if err != nil || n < 1 || n > maxNodes {
			return fmt.Errorf("no node %q: a number from 1 to %d, or node1 to node%d", args[0], maxNodes, maxNodes)
		}
		return f(ctx, c, n, args[1:])
	}
}
