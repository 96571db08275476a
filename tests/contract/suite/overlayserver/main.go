// SPDX-License-Identifier: Apache-2.0

// Overlayserver serves containerd's own overlayfs snapshotter, and nothing else of containerd, on a unix socket: what
// ours is compared with. Its metadata is containerd's bolt database, its removal asynchronous, as containerd has it.
//
// Usage: overlayserver ROOT SOCKET
package main

import (
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/snapshots/overlay"
	"google.golang.org/grpc"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: overlayserver ROOT SOCKET")
	}
	snapshotter, err := overlay.NewSnapshotter(os.Args[1], overlay.AsynchronousRemove)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("unix", os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-stop
		server.GracefulStop()
	}()
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
	if err := snapshotter.Close(); err != nil {
		log.Fatal(err)
	}
}
