// Command churn runs in the virtual machine of the power cut tests. It checks the
// disks that the plan names, each as it was left by a cut, and then changes volumes
// on the last one until the power goes: it creates, writes, expands, takes snapshots
// and group snapshots, restores, clones and deletes through the driver, and says on the
// serial line what it begins and what was acknowledged.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

const (
	mib  = int64(1) << 20
	work = "/run/churn"
	pool = work + "/pool"
	// rounds bounds the churn: the power should go long before.
	rounds = 10000
)

func main() {
	c, err := load()
	if err == nil {
		err = c.run()
	}
	if err != nil {
		fmt.Println("churn:", err)
		c.say(plan.Entry{Op: plan.OpProblem, Text: err.Error()})
		os.Exit(1)
	}
}

// churn is the state of one boot.
type churn struct {
	plan plan.CutPlan
	mu   sync.Mutex // one line at a time

	// Of the disk at hand.
	fates  map[string]*plan.Fate
	poolID string
	driver *exec.Cmd
	conn   *grpc.ClientConn
}

func load() (*churn, error) {
	c := &churn{}
	f, err := os.Open(plan.LedgerDisk)
	if err != nil {
		return c, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(bytes.TrimRight(b, "\x00"), &c.plan)
}

// say sends a line and waits until it is out of the machine.
func (c *churn) say(e plan.Entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Println(e.Line(c.plan.Token))
	// TCSBRK with an argument waits for the line (tcdrain).
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1)
}

func (c *churn) run() error {
	if err := os.MkdirAll(pool, 0o700); err != nil {
		return err
	}
	if c.plan.Boot == 0 {
		out, err := exec.Command("mkfs."+c.plan.Filesystem, plan.PoolDisk).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mkfs: %w: %s", err, out)
		}
		c.plan.Check = []plan.Cut{{Device: plan.PoolDisk}}
	}
	for i, cut := range c.plan.Check {
		if err := c.serve(cut); err != nil {
			return fmt.Errorf("%s: %w", cut.Device, err)
		}
		c.fates = plan.Fates(c.plan.Entries, cut.Acked, cut.Begun)
		if err := c.check(); err != nil {
			c.say(plan.Entry{Op: plan.OpProblem, Text: cut.Device + ": " + err.Error()})
		}
		c.say(plan.Entry{Op: plan.OpChecked, Volume: "", Text: cut.Device})
		if last := i == len(c.plan.Check)-1; last && !c.plan.CheckOnly {
			break
		}
		if err := c.down(); err != nil {
			return fmt.Errorf("%s: %w", cut.Device, err)
		}
	}
	if c.plan.CheckOnly {
		return nil
	}
	c.say(plan.Entry{Op: plan.OpChurn})
	return c.change()
}

// change changes things until the power goes.
func (c *churn) change() error {
	var workers sync.WaitGroup
	worker := func(f func() error) {
		workers.Go(func() {
			if err := f(); err != nil {
				c.say(plan.Entry{Op: plan.OpProblem, Text: err.Error()})
			}
		})
	}
	for i, kind := range []string{"ext4", "block", "thin"} {
		worker(func() error {
			for n := range rounds {
				l := c.newLife(kind, fmt.Sprintf("%s-%d-%d-%d", kind, c.plan.Boot, i, n))
				if err := l.run(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	worker(c.removeOld)
	workers.Wait()
	return errors.New("the power did not go")
}

// serve mounts a disk and starts the driver on it. It says how far it is if that is to
// be cut, and the disk stays as it is until that was heard.
func (c *churn) serve(cut plan.Cut) error {
	if out, err := exec.Command("mount", "-t", c.plan.Filesystem, cut.Device, pool).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	if cut.Again {
		c.say(plan.Entry{Op: plan.OpMounted, Text: cut.Device})
	}
	err := c.up()
	if cut.Again {
		c.say(plan.Entry{Op: plan.OpRecovered, Text: cut.Device})
		time.Sleep(plan.InFlight)
	}
	return err
}

// up starts the driver on the disk that is mounted.
func (c *churn) up() error {
	if err := os.MkdirAll(pool+"/csi", 0o700); err != nil {
		return err
	}
	socket := work + "/csi.sock"
	c.driver = exec.Command("/tests/bin/csi-loop", "serve", "--endpoint=unix://"+socket, "--node-id=vm", "--pool=default="+pool+"/csi", "--state-dir="+work+"/state")
	log, err := os.Create(work + "/log")
	if err != nil {
		return err
	}
	defer log.Close()
	c.driver.Stdout, c.driver.Stderr = log, log
	if err := c.driver.Start(); err != nil {
		return err
	}
	if c.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := csi.NewIdentityClient(c.conn).Probe(ctx, &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		b, _ := os.ReadFile(work + "/log")
		return fmt.Errorf("the driver does not come up: %w: %s", err, b)
	}
	b, err := os.ReadFile(pool + "/csi/pool.json")
	if err != nil {
		return err
	}
	var record struct {
		ID string `json:"id"`
	}
	err = json.Unmarshal(b, &record)
	c.poolID = record.ID
	return err
}

func (c *churn) down() error {
	_ = c.conn.Close()
	if err := c.driver.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	err := c.driver.Wait()
	if err == nil {
		err = unix.Unmount(pool, 0)
	}
	return err
}
